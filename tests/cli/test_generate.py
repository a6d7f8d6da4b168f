"""generate and demo."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import ernie_jax
from ernie_jax.text import Tokenizer
from tests.cli.conftest import ROOT, read_lines, write_lines

END = 2
SIZE = {"cache_tokens": 4096, "max_sequences": 4}  # the same everywhere, so that programs are compiled once
SMALL = ("--cache_tokens=4096", "--max_sequences=4", "--temperature=0")


@pytest.fixture
def files(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def test_prompt_streams_text_to_stdout_and_the_rest_to_stderr(run, embedded):
    result = run("generate", f"--model={embedded}", "--prompt=In the beginning", "--max_new_tokens=8", *SMALL)
    assert result.code == 0
    llm = ernie_jax.load(embedded, **SIZE)
    (expected,) = llm.generate(["In the beginning"], llm.sampling_params(max_new_tokens=8, temperature=0))
    assert result.out == f"In the beginning{expected.text}\n"
    assert "sharding single" in result.err and "bfloat16" in result.err and "cache 4,096 tokens" in result.err
    assert "experts:" in result.err and "attention:" in result.err and "[8 tokens" in result.err


def test_file_of_texts_ids_and_messages(run, embedded, files):
    source, target = files
    write_lines(source, [
        {"prompt": "In the beginning", "max_new_tokens": 30, "stop": ["e"]},
        {"token_ids": [290, 493], "max_new_tokens": 5, "logprobs": True, "top_logprobs": 2},
        {"messages": [{"role": "user", "content": "Who art thou?"}], "seed": 3, "temperature": 1.5},
        {"prompt": "And", "logit_bias": {"2": 100}},
    ])  # fmt: skip
    arguments = ("generate", f"--model={embedded}", f"--input={source}", f"--output={target}", "--max_new_tokens=7")
    result = run(*arguments, *SMALL)
    assert (result.code, result.out) == (0, "")
    assert "wrote 4 lines" in result.err and "0 with an error" in result.err
    text, ids, chat, stopped = read_lines(target)
    assert list(text) == ["text", "token_ids", "finish_reason", "usage"]
    assert text["finish_reason"] == "stop" and "e" not in text["text"]
    tokenizer = Tokenizer.load(embedded)
    assert "e" in tokenizer.decode(text["token_ids"])
    assert text["usage"]["prompt_tokens"] == len(tokenizer.encode("In the beginning"))
    assert ids["usage"] == {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7}
    assert ids["finish_reason"] == "length" and len(ids["token_ids"]) == 5
    assert len(ids["logprobs"]) == 5 and all(value < 0 for value in ids["logprobs"])
    for token, logprob, top in zip(ids["token_ids"], ids["logprobs"], ids["top_logprobs"], strict=True):
        assert len(top) == 2 and top[str(token)] == logprob == max(top.values())
    assert len(chat["token_ids"]) == 7
    assert stopped["token_ids"] == [END] and stopped["text"] == "" and stopped["finish_reason"] == "stop"


def test_token_ids_need_no_tokenizer(run, tiny, files):
    source, target = files
    write_lines(source, [
        {"token_ids": [5, 6, 7], "logit_bias": {"2": 100}},
        {"token_ids": [5, 6, 7], "logit_bias": {"2": 100}, "ignore_eos": True},
        {"token_ids": [9], "stop_token_ids": list(range(320))},
        {"token_ids": [9] * 40},
        {"token_ids": [9], "stop": ["x"]},
    ])  # fmt: skip
    arguments = ("--max_new_tokens=3", "--logprobs", *SMALL)
    result = run("generate", f"--model={tiny}", f"--input={source}", f"--output={target}", *arguments)
    ended, ignored, stopped, free, bad = read_lines(target)
    assert ended["token_ids"] == [END] and ended["finish_reason"] == "stop" and ended["text"] is None
    assert ignored["token_ids"] == [END] * 3 and ignored["finish_reason"] == "length"
    assert len(stopped["token_ids"]) == 1 and stopped["finish_reason"] == "stop"
    llm = ernie_jax.load(tiny, **SIZE)
    (expected,) = llm.generate([[9] * 40], ernie_jax.SamplingParams(max_new_tokens=3, temperature=0, logprobs=True))
    assert free["token_ids"] == expected.token_ids
    assert free["logprobs"] == pytest.approx(expected.logprobs, abs=1e-4)
    assert bad["error"].startswith("line 5: ") and "tokenizer" in bad["error"]
    assert result.code == 1


def test_ignore_eos_for_all(run, tiny, files):
    source, target = files
    write_lines(source, [{"token_ids": [5], "logit_bias": {"2": 100}}])
    arguments = ("--ignore_eos", "--max_new_tokens=2", *SMALL)
    assert run("generate", f"--model={tiny}", f"--input={source}", f"--output={target}", *arguments).code == 0
    assert read_lines(target)[0]["token_ids"] == [END, END]


BAD_LINES = {
    '{"prompt": "x"': "not valid JSON",
    "": "not valid JSON",
    "[1, 2]": "not a JSON object",
    "{}": "exactly one of prompt, token_ids, messages; found none",
    '{"prompt": "x", "token_ids": [1]}': "exactly one of prompt, token_ids, messages; found prompt, token_ids",
    '{"prompt": 3}': "field prompt must be text",
    '{"prompt": ""}': "the prompt is empty",
    '{"prompt": "\\ud800"}': "surrogate",
    '{"token_ids": []}': "the prompt is empty",
    '{"token_ids": 5}': "field token_ids must be a list of integers",
    '{"token_ids": [true]}': "field token_ids must be a list of integers",
    '{"token_ids": [1.5]}': "field token_ids must be a list of integers",
    '{"token_ids": [5120]}': "token id 5120 is outside the vocabulary of 5120",
    '{"token_ids": [-1]}': "token id -1 is outside",
    '{"messages": "hello"}': "field messages must be a list of objects",
    '{"messages": [{"role": "user"}]}': "messages[0]: content",
    '{"messages": [{"role": "king", "content": "x"}]}': "messages[0]: role is 'king'",
    '{"messages": [{"role": "user", "content": "x"}], "tools": 3}': "tools must be a list of function tools",
    '{"prompt": "x", "tools": []}': "tools go with messages",
    '{"prompt": "x", "frob": 1}': "unknown sampling field frob",
    '{"prompt": "x", "\\ud800": 1}': "unknown sampling field",
    '{"prompt": "x", "temperature": "hot"}': "temperature is 'hot'",
    '{"prompt": "x", "temperature": NaN}': "temperature is nan",
    '{"prompt": "x", "max_new_tokens": 0}': "max_new_tokens is 0",
    '{"prompt": "x", "stop": [""]}': "stop",
    '{"prompt": "x", "logit_bias": {"5120": 1}}': "5120",
    '{"prompt": "x", "top_logprobs": 2}': "needs logprobs",
}


def test_bad_lines_get_an_error_in_their_place(run, embedded, files):
    source, target = files
    good = {"prompt": "And", "max_new_tokens": 2}
    long = {"token_ids": [5] * 4096}
    write_lines(source, [good, *BAD_LINES, long, good])
    result = run("generate", f"--model={embedded}", f"--input={source}", f"--output={target}", *SMALL)
    assert result.code == 1
    assert f"{len(BAD_LINES) + 1} with an error" in result.err
    first, *bad, last = read_lines(target)
    assert first == last and len(first["token_ids"]) == 2
    for number, (record, words) in enumerate(zip(bad, [*BAD_LINES.values(), "context of 4096"], strict=True), 2):
        assert list(record) == ["error"]
        assert record["error"].startswith(f"line {number}: ") and words in record["error"], record


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt="], "--prompt is empty"),
        (["--prompt=" + "word " * 5000], "exceeds the model's context of 4096"),
        (["--prompt=x", "--temperature=-1"], "temperature is -1.0"),
        (["--prompt=x", "--top_p=2"], "top_p is 2.0"),
        (["--prompt=x", "--dtype=int8"], "dtype 'int8'"),
        (["--prompt=x", "--ops=attention=fast"], "attention backend 'fast'"),
        (["--prompt=x", "--ops=attention=rpa"], "backend rpa does not run on a cpu"),
        (["--prompt=x", "--ops=softmax=fast"], "--ops=softmax=fast"),
        (["--prompt=x", "--ops=experts=fast"], "expert backend 'fast'"),
        (["--prompt=x", "--max_sequences=0"], "max_sequences is 0"),
        (["--prompt=x", "--cache_tokens=128"], "--cache_tokens"),
        (["--input=missing.jsonl", "--output=out.jsonl"], "--input=missing.jsonl: No such file"),
    ],
)
def test_bad_input_exits_with_1_in_one_sentence(run, embedded, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    result = run("generate", f"--model={embedded}", *arguments)
    assert (result.code, result.out) == (1, "")
    last = result.err.splitlines()[-1]
    assert last.startswith("error: ") and words in last
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_behind_when_the_model_is_bad(run, files):
    source, target = files
    write_lines(source, [{"token_ids": [5]}])
    assert run("generate", f"--model={source.parent}", f"--input={source}", f"--output={target}").code == 1
    assert list(source.parent.iterdir()) == [source]


def test_a_text_prompt_needs_a_tokenizer(run, tiny):
    result = run("generate", f"--model={tiny}", "--prompt=x", *SMALL)
    assert result.code == 1 and "no tokenizer; give token ids" in result.err


def test_a_killed_run_goes_on(run, tiny, files):
    source, target = files
    write_lines(source, [{"token_ids": [7 + index], "max_new_tokens": 150} for index in range(16)])
    arguments = ["generate", f"--model={tiny}", f"--input={source}", f"--output={target}", "--ignore_eos"]
    arguments += ["--cache_tokens=1024", "--max_sequences=1", "--temperature=0"]
    process = subprocess.Popen([sys.executable, ROOT / "main.py", *arguments], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        written = b""
        while written.count(b"\n") < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
            written = b"".join(partial.read_bytes() for partial in source.parent.glob("out.jsonl.*.partial"))
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    (partial,) = source.parent.glob("out.jsonl.*.partial")
    done = partial.read_bytes().count(b"\n")
    assert 2 <= done < 16
    with partial.open("ab") as file:
        file.write(b'{"text": nu')
    result = run(*arguments)
    assert result.code == 0 and f"going on after line {done} of an earlier run" in result.err
    resumed = target.read_bytes()
    assert sorted(os.listdir(source.parent)) == ["in.jsonl", "out.jsonl"]
    fresh = run(*arguments)
    assert "going on" not in fresh.err and target.read_bytes() == resumed
    assert len(read_lines(target)) == 16


def test_demo_converts_once_and_streams(run, cache):
    for converted in cache.glob("checkpoints/ernie-embedded-*"):  # other tests serve it
        shutil.rmtree(converted)
    first, again = run("demo"), run("demo")
    assert first.code == again.code == 0
    assert "converting" in first.err and "converting" not in again.err
    assert first.out == again.out
    assert "In the beginning God created" in first.out and "李白\n" in first.out
    assert len(first.out.split()) > 60
