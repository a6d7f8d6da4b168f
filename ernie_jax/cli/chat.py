"""chat."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator

from absl import flags

from ernie_jax.cli import hosts, models
from ernie_jax.cli.command import Command
from ernie_jax.errors import UserError
from ernie_jax.text.answer import (
    AnswerFormat,
    AnswerParser,
    Content,
    Event,
    Reasoning,
    ToolCallArguments,
    ToolCallStart,
    tag_ids,
)


def _define(values: flags.FlagValues) -> None:
    models.define_model_flags(values)
    models.define_sampling_flags(values, max_new_tokens=1024)
    flags.DEFINE_string("system", None, "the system message", flag_values=values)


def _chat(values: flags.FlagValues) -> None:
    with contextlib.suppress(ImportError):  # where there is no readline, lines are edited without it
        import readline  # noqa: F401

    hosts.refuse_several("chat")
    settings = models.sampling_fields(values)
    llm = models.load(values, max_sequences=1)
    if llm.tokenizer is None:
        raise UserError(f"--model={values.model} has no tokenizer, which chat needs")
    params = llm.sampling_params(**settings)
    opening = [{"role": "system", "content": values.system}] if values.system else []
    messages = list(opening)
    print("/reset starts anew, /exit ends, Ctrl-C stops an answer", file=sys.stderr)
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D ends", file=sys.stderr)
            continue
        if said == "/exit":
            return
        if said == "/reset":
            messages = list(opening)
            print("a new conversation", file=sys.stderr)
        elif said.startswith("/"):
            print(f"unknown command {said.split()[0]}; there are /reset and /exit", file=sys.stderr)
        elif said:
            turn = [*messages, {"role": "user", "content": said}]
            try:
                answer = _answer(llm, turn, params)
            except UserError as error:  # too long, most likely: the conversation stays as it was
                print(f"error: {error}; /reset starts anew", file=sys.stderr)
            else:
                messages = [*turn, answer]


def _answer(llm, messages: list[dict], params) -> dict:
    """Stream an answer and return its message; Ctrl-C ends it, and what was said until then counts."""
    from ernie_jax.server.protocol import AnswerMessage, Fields  # imports JAX
    from ernie_jax.server.protocol.chat import read_message

    form = AnswerFormat.of(llm.template, llm.template.render(messages))
    parser = AnswerParser(dataclasses.replace(form, whole_calls=True))
    message, screen, truncated = AnswerMessage(), _Screen(), True

    def take(events: list[Event]) -> None:
        message.add(events)
        screen.show(events)

    chunks = llm.stream([messages], params, tag_ids(llm.tokenizer))
    with contextlib.closing(chunks), _hold_interrupts() as interrupts:
        for chunk in chunks:
            take(parser.feed(chunk.text))
            if chunk.completion:
                truncated = chunk.completion.token_ids[-1] not in llm.engine.stop_ids
            elif interrupts:
                break
    take(parser.finish(truncated))
    print(" [stopped]" if interrupts else "")
    return read_message(Fields(message.chat))  # as the server reads it when a client sends it back


class _Screen:
    """Print the parts of an answer as they come, each from a new line on.

    Thoughts are dimmed on a terminal. Elsewhere, and where NO_COLOR is set, headings tell them from the answer.
    """

    def __init__(self):
        self._dims = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._part = ""

    def show(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case Reasoning(text):
                    self._begin("thoughts")
                    self._print(f"\x1b[2m{text}\x1b[0m" if self._dims else text)
                case Content(text):
                    self._begin("answer")
                    self._print(text)
                case ToolCallStart(name=name):
                    self._begin("call")
                    self._print(f"[call] {name} ")
                case ToolCallArguments(text=text):  # JSON, whose line breaks are blanks: in strings they are escaped
                    self._print(re.sub(r"\s*\n\s*", " ", text))

    def _begin(self, part: str) -> None:
        """End the part before, if this is another, and write a heading where one is needed."""
        before, self._part = self._part, part
        if part == before != "call":
            return
        if before:
            self._print("\n\n" if self._dims and before == "thoughts" else "\n")
        # An answer without thoughts needs no heading.
        if not self._dims and (part == "thoughts" or (part == "answer" and before)):
            self._print(f"[{part}]\n")

    def _print(self, text: str) -> None:
        print(text, end="", flush=True)


@contextlib.contextmanager
def _hold_interrupts() -> Iterator[list]:
    """Collect Ctrl-C, which raised in the middle of a step would leave the engine in pieces; the second one raises."""
    interrupts = []

    def hold(number, frame):
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(number)

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


CHAT = Command(
    "chat",
    "Talk with a model, many turns, streamed. /reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops the "
    "answer only. Thoughts are dimmed on a terminal, elsewhere or with NO_COLOR set they have a heading.",
    ("main.py chat --model=checkpoints/21b", "main.py chat --model=checkpoints/21b --system='Answer in Chinese.'"),
    _define,
    _chat,
)
