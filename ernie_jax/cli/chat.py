"""chat."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator

from absl import flags

from ernie_jax.cli import hosts, models
from ernie_jax.cli.command import Command
from ernie_jax.errors import UserError


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
                messages = [*turn, {"role": "assistant", "content": _without_thoughts(answer)}]


def _answer(llm, messages: list[dict], params) -> str:
    """Stream an answer; Ctrl-C ends it, and what was said until then counts."""
    pieces = []
    with contextlib.closing(llm.stream([messages], params)) as chunks, _hold_interrupts() as interrupts:
        for chunk in chunks:
            pieces.append(chunk.text)
            print(chunk.text, end="", flush=True)
            if interrupts:
                print(" [stopped]", end="")
                break
    print()
    return "".join(pieces)


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
