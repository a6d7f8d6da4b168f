"""chat."""

import os
import pty
import re
import select
import signal
import subprocess
import sys

import pytest

from ernie_jax import LLM
from tests.cli.conftest import ROOT

SIZE = ("--cache_tokens=4096",)


@pytest.fixture
def say(monkeypatch):
    """Give the lines that are typed; Ctrl-D follows the last."""

    def prepare(*lines):
        typed = iter(lines)

        def read(prompt):
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)

    return prepare


@pytest.fixture
def conversations(monkeypatch) -> list:
    """Collect the messages that the model is asked to continue."""
    seen = []
    stream = LLM.stream

    def spy(self, prompts, params):
        seen.extend(prompts)
        return stream(self, prompts, params)

    monkeypatch.setattr(LLM, "stream", spy)
    return seen


def test_turns_reset_and_exit(run, embedded, say, conversations):
    say("hello", "", "and then?", "/reset", "/what", KeyboardInterrupt(), "again", "/exit", "never read")
    result = run("chat", f"--model={embedded}", "--system=Be brief.", "--max_new_tokens=5", "--temperature=0", *SIZE)
    assert result.code == 0
    first, second, third = conversations
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}
    assert first == [system, user]
    assert second[:2] == first and second[2]["role"] == "assistant" and second[3]["content"] == "and then?"
    assert third == [system, {"role": "user", "content": "again"}]
    answers = result.out.splitlines()
    assert answers[0].strip() == second[2]["content"] != ""
    assert "unknown command /what" in result.err and "a new conversation" in result.err
    assert "/exit or Ctrl-D ends" in result.err


def test_a_turn_that_does_not_fit_is_not_kept(run, embedded, say, conversations):
    say("hello " * 4000, "hello")
    result = run("chat", f"--model={embedded}", "--max_new_tokens=3", *SIZE)
    assert result.code == 0
    assert "error: the prompt has" in result.err and "/reset" in result.err
    assert conversations[1] == [{"role": "user", "content": "hello"}]


def test_chat_needs_a_tokenizer(run, tiny, say):
    say("hello")
    result = run("chat", f"--model={tiny}", "--cache_tokens=1024")
    assert result.code == 1 and "no tokenizer" in result.err


def test_thoughts_are_not_repeated_to_the_model():
    from ernie_jax.cli.chat import _without_thoughts

    assert _without_thoughts("<think>\nhm\n</think>\n<response>\nYes.\n</response>\n") == "Yes."
    assert _without_thoughts(" plain ") == "plain"


def test_ctrl_c_stops_the_answer_only(embedded):
    """In a terminal: Ctrl-C while an answer streams, twice, and at the prompt; then /exit."""
    arguments = [f"--model={embedded}", "--ignore_eos", "--max_new_tokens=3500", "--temperature=0", *SIZE]
    screen, terminal = pty.openpty()
    command = [sys.executable, ROOT / "main.py", "chat", *arguments]
    # A background shell has Ctrl-C ignored, which programs inherit.
    hears = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", hears, *command]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    seen = ""

    def wait_for(pattern):
        """Read the screen up to a pattern and forget it."""
        nonlocal seen
        while not (found := re.search(pattern, seen, re.DOTALL)):
            assert select.select([screen], [], [], 60)[0], seen
            seen += os.read(screen, 1 << 16).decode(errors="replace")
        seen = seen[found.end() :]

    try:
        wait_for("> $")
        for question in (b"hello\n", b"again\n"):
            os.write(screen, question)
            wait_for(r"\n.{40}")
            process.send_signal(signal.SIGINT)
            wait_for(r"\[stopped\]\s+> $")
        for _ in range(10):  # input() sleeps through a signal that comes between its prompt and its waiting
            process.send_signal(signal.SIGINT)
            if select.select([screen], [], [], 2)[0]:
                break
        wait_for("/exit or Ctrl-D ends\\s+> $")
        os.write(screen, b"/exit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(screen)
