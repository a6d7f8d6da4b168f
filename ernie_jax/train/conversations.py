"""Conversations as training examples: rendered as the server renders them, learnt where the assistant speaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ernie_jax.text import ChatTemplate, Tokenizer
from ernie_jax.text.answer import AnswerFormat, write_answer

_TURN_END = "<|im_end|>"  # of the Thinking template; Base and PT separate rounds by their sep token


class Example(NamedTuple):
    """Token ids, and which of them are to be predicted."""

    tokens: list[int]
    learnt: list[bool]


def render_examples(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    template: ChatTemplate,
    tokenizer: Tokenizer,
) -> list[Example]:
    """Return the examples that teach every answer of a conversation, each closed by the tokenizer's eos token.

    Where the template renders an answer within a longer conversation just as it was given, as that of Base and PT does,
    the answers share one example. The Thinking template drops the reasoning of earlier rounds: an example an answer.

    Args:
      messages: OpenAI chat messages; what the assistant thought is `reasoning_content`.

    Raises:
      UserError: as ChatTemplate.render.
    """
    eos = tokenizer.token_id(tokenizer.special_tokens["eos_token"])
    chat_ml = template.mentions(_TURN_END)
    turn_end = _TURN_END if chat_ml else tokenizer.special_tokens["sep_token"]
    found, text = [], ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = template.render(messages[:index], tools)
        answer = write_answer(AnswerFormat.of(template, prompt), message) + turn_end
        if not found or not prompt.startswith(text):
            found.append(Example([], []))
            text = ""
        # Prompts are encoded without what follows them, as they are when the model is asked.
        for part, learnt in ((prompt[len(text) :], False), (answer, True)):
            tokens = tokenizer.encode(part)
            found[-1].tokens.extend(tokens)
            found[-1].learnt.extend([learnt] * len(tokens))
        text = prompt + answer
    for tokens, learnt in found:
        if chat_ml:  # which has said already that the turn is over
            tokens.append(eos)
            learnt.append(False)
        else:
            tokens[-1] = eos
    return found
