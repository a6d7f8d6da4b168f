"""OpenAI's API without HTTP and engine: requests read from JSON; answers, stream chunks and errors built for JSON.

request = ChatRequest.parse(parse_body(body), defaults)
prompt = request.conversation.render(template)
form = request.conversation.format(template, prompt, request.generation.stream)
grammar = request.conversation.grammar(guidance, form)
params = request.generation.params(len(tokenizer.encode(prompt)), context)
parser, message = AnswerParser(form), AnswerMessage()
message.add(parser.feed(text))
"""

from ernie_jax.server.protocol.chat import AnswerMessage, ChatAnswer, ChatRequest, Conversation
from ernie_jax.server.protocol.completions import (
    CompletionAnswer,
    CompletionRequest,
    TokenizeRequest,
    parse_detokenize,
)
from ernie_jax.server.protocol.errors import ApiError, context_exceeded, model_not_found
from ernie_jax.server.protocol.events import DONE, named_event, plain_event
from ernie_jax.server.protocol.fields import Fields, parse_body
from ernie_jax.server.protocol.generation import Generation, TokenScore, Usage, completion_logprobs
from ernie_jax.server.protocol.responses import ResponseAnswer, ResponsesRequest

__all__ = [
    "DONE",
    "AnswerMessage",
    "ApiError",
    "ChatAnswer",
    "ChatRequest",
    "CompletionAnswer",
    "CompletionRequest",
    "Conversation",
    "Fields",
    "Generation",
    "ResponseAnswer",
    "ResponsesRequest",
    "TokenScore",
    "TokenizeRequest",
    "Usage",
    "completion_logprobs",
    "context_exceeded",
    "model_not_found",
    "named_event",
    "parse_body",
    "parse_detokenize",
    "plain_event",
]
