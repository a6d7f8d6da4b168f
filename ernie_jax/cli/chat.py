"""chat."""

from __future__ import annotations

import contextlib
import sys

from absl import flags

from ernie_jax.cli import models
from ernie_jax.cli.command import Command
from ernie_jax.errors import UserError


def _define(values: flags.FlagValues) -> None:
    models.define_model_flags(values)
    models.define_sampling_flags(values)
    flags.DEFINE_string("system", None, "the system message", flag_values=values)


def _chat(values: flags.FlagValues) -> None:
    llm = models.load(values, max_sequences=1)
    if llm.tokenizer is None:
        raise UserError(f"--model={values.model} has no tokenizer, which chat needs")
    params = llm.sampling_params(**{"max_new_tokens": 1024, **models.sampling_fields(values)})
    opening = [{"role": "system", "content": values.system}] if values.system else []
    messages = list(opening)
    print("/reset starts anew, /exit ends, Ctrl-C stops an answer", file=sys.stderr)
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            print()
            return
        if said == "/exit":
            return
        if said == "/reset":
            messages = list(opening)
        elif said.startswith("/"):
            print(f"unknown command {said.split()[0]}; there are /reset and /exit", file=sys.stderr)
        elif said:
            turn = [*messages, {"role": "user", "content": said}]
            try:
                answer = _answer(llm, turn, params)
            except UserError as error:  # too long, most likely: the conversation stays as it was
                print(f"error: {error}; /reset starts anew", file=sys.stderr)
            else:
                messages = [*turn, {"role": "assistant", "content": _without_thoughts(answer)}]


def _answer(llm, messages: list[dict], params) -> str:
    """Stream an answer; Ctrl-C ends it, and what was said until then counts."""
    pieces = []
    with contextlib.closing(llm.stream([messages], params)) as chunks:
        try:
            for chunk in chunks:
                pieces.append(chunk.text)
                print(chunk.text, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
    print()
    return "".join(pieces)


def _without_thoughts(answer: str) -> str:
    """Return what the next turn is to see of an answer: without reasoning and response tags."""
    _, _, said = answer.rpartition("</think>")
    return said.replace("<response>", "").replace("</response>", "").strip()


CHAT = Command(
    "chat",
    "Talk with a model, many turns, streamed. /reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops the "
    "answer only.",
    ("main.py chat --model=checkpoints/21b", "main.py chat --model=checkpoints/21b --system='Answer in Chinese.'"),
    _define,
    _chat,
)
