"""Conversations as training examples: rendered as the server renders them, learnt where the assistant speaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ernie_jax.errors import UserError
from ernie_jax.text import ChatTemplate, Tokenizer
from ernie_jax.text.answer import THINK_CLOSE, THINK_OPEN, AnswerFormat, write_answer
from ernie_jax.text.chat import read_messages

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
      messages: OpenAI chat messages; what the assistant thought is `reasoning_content`. An answer with `weight` 0 is
        shown and not learnt.

    Raises:
      UserError: as ChatTemplate.render.
    """
    messages = read_messages(messages)
    eos = tokenizer.token_id(tokenizer.special_tokens["eos_token"])
    chat_ml = template.mentions(_TURN_END)
    turn_end = _TURN_END if chat_ml else tokenizer.special_tokens["sep_token"]
    found, text = [], ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = template.render(messages[:index], tools)
        form = AnswerFormat.of(template, prompt)
        answer = write_answer(form, _with_reasoning_apart(message) if form.thinking else message) + turn_end
        if not found or not prompt.startswith(text):
            found.append(Example([], []))
            text = ""
        # Prompts are encoded without what follows them, as they are when the model is asked.
        for part, learnt in ((prompt[len(text) :], False), (answer, bool(message.get("weight", 1)))):
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
    return [example for example in found if any(example.learnt)]


def render_pair(
    prompt: Sequence[Mapping[str, Any]],
    chosen: Sequence[Mapping[str, Any]],
    rejected: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    template: ChatTemplate,
    tokenizer: Tokenizer,
) -> tuple[Example, Example]:
    """Return the examples of two continuations of a conversation; learnt is what the assistant says in them.

    Raises:
      UserError: as ChatTemplate.render, or if a continuation has several answers and the template shows them otherwise
        than it asks for them.
    """
    shown = [{**message, "weight": 0} for message in prompt]
    examples = [render_examples([*shown, *messages], tools, template, tokenizer) for messages in (chosen, rejected)]
    if any(len(example) != 1 for example in examples):
        raise UserError(
            "chosen and rejected must have one answer each: the model's chat template shows the reasoning of the last "
            "round only"
        )
    return examples[0][0], examples[1][0]


def _with_reasoning_apart(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an answer whose reasoning stands within its content, as <think>...</think>, with it apart."""
    content = message["content"] or ""
    if message.get("reasoning_content") is not None or not content.lstrip().startswith(THINK_OPEN):
        return message
    reasoning, close, content = content.partition(THINK_CLOSE)
    if not close:
        return message
    reasoning = reasoning.partition(THINK_OPEN)[2].strip("\n")
    return {**message, "reasoning_content": reasoning, "content": content.lstrip("\n")}
