"""chat."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys

import pytest

from convert import convert
from ernie_jax import LLM
from ernie_jax.llm import Chunk, Completion
from ernie_jax.server.protocol import Fields
from ernie_jax.server.protocol.chat import read_conversation
from ernie_jax.text import ChatTemplate, Tokenizer
from ernie_jax.text.answer import TAGS
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

    def spy(self, prompts, *rest):
        seen.extend(prompts)
        return stream(self, prompts, *rest)

    monkeypatch.setattr(LLM, "stream", spy)
    return seen


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    """The embedded Thinking model, converted."""
    directory = tmp_path_factory.mktemp("thinking") / "checkpoint"
    convert(str(ROOT / "models" / "ernie-embedded-thinking"), str(directory))
    return directory


@pytest.fixture
def answers(monkeypatch):
    """Let the model say given texts in place of its own, a letter at a time; each ends as its token and reason say."""

    def prepare(*texts, token="<|im_end|>", reason="stop"):
        left = iter(texts)

        def stream(self, prompts, params, keep):
            text = next(left)
            yield from (Chunk(0, letter, None) for letter in text)
            yield Chunk(0, "", Completion(text, [self.tokenizer.token_id(token)], reason, 1))

        monkeypatch.setattr(LLM, "stream", stream)

    return prepare


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


@pytest.mark.parametrize("special", [False, True])
def test_thoughts_and_answers_are_apart_and_the_prompt_is_the_servers(
    run, thinking, conversations, monkeypatch, tmp_path, special
):
    if special:  # tags that a checkpoint declares as special, which text leaves out, divide the answer as well
        thinking = shutil.copytree(thinking, tmp_path / "special")
        config = json.loads((thinking / "tokenizer_config.json").read_text())
        (thinking / "tokenizer_config.json").write_text(json.dumps(config | {"additional_special_tokens": [*TAGS]}))
        assert Tokenizer.load(thinking).decode([Tokenizer.load(thinking).token_id("</think>")]) == ""
    monkeypatch.setattr(sys, "stdin", io.StringIO("My name is Clara.\nWhat is my name?\n"))
    prompts = []
    encode = LLM.encode
    monkeypatch.setattr(LLM, "encode", lambda self, prompt: prompts.append(encode(self, prompt)) or prompts[-1])
    result = run("chat", f"--model={thinking}", "--dtype=float32", "--temperature=0", *SIZE)
    assert result.code == 0
    turn = r"> \[thoughts\]\n([^<\[]+)\n\[answer\]\n%s\n"
    told = turn % "Nice to meet you, Clara!"
    assert (thoughts := re.fullmatch(told + turn % "Your name is Clara." + "> \n", result.out)), result.out

    user = {"role": "user", "content": "My name is Clara."}
    answer = {"role": "assistant", "content": "Nice to meet you, Clara!", "reasoning_content": thoughts[1]}
    messages = [user, answer, {"role": "user", "content": "What is my name?"}]
    assert conversations == [[user], messages]
    sent = read_conversation(Fields({"messages": messages}))
    tokenizer = Tokenizer.load(thinking)
    assert prompts[1] == tokenizer.encode(sent.render(ChatTemplate.load(thinking, tokenizer)))


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_gets_dim_thoughts_unless_told_not_to(run, thinking, say, answers, monkeypatch, no_color):
    say("hello")
    answers("hm\n</think>\n\n<response>\nYes.\n</response>\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", no_color)
    result = run("chat", f"--model={thinking}", *SIZE)
    dim = "\x1b[2mh\x1b[0m\x1b[2mm\x1b[0m\n\nYes.\n\n"
    assert result.out == ("[thoughts]\nhm\n[answer]\nYes.\n\n" if no_color else dim)


def test_tool_calls_are_lines(run, thinking, say, answers, monkeypatch):
    say("weather?", "and then?")
    call = '\n\n<tool_call>\n{"name": "weather", "arguments": {\n  "city": "%s"\n}}\n</tool_call>\n'
    answers("two calls\n</think>\n" + call % "Oslo" + call % "São Paulo", "no\n</think>\n" + '<tool_call>\n{"a": 1}')
    seen = []
    render = ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda self, messages: seen.append(messages) or render(self, messages))
    result = run("chat", f"--model={thinking}", *SIZE)
    first, second = result.out.split("[thoughts]\n")[1:]
    assert first == 'two calls\n[call] weather { "city": "Oslo" }\n[call] weather { "city": "São Paulo" }\n'
    assert second == 'no\n[answer]\n<tool_call>\n{"a": 1}\n\n'  # what is no call is text
    _, said, _ = seen[-1]
    assert said["content"] is None and said["reasoning_content"] == "two calls"
    made = [json.loads(call["function"]["arguments"]) for call in said["tool_calls"]]
    assert made == [{"city": "Oslo"}, {"city": "São Paulo"}]


def test_a_tag_that_was_cut_off_is_not_shown(run, thinking, say, answers):
    say("hello")
    answers("hm\n</think>\n\n<response>\nYes.\n</resp", token="a", reason="length")
    assert run("chat", f"--model={thinking}", *SIZE).out == "[thoughts]\nhm\n[answer]\nYes.\n\n"


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
