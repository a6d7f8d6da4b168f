"""docs/training.md's ways from JSONL files to adapters, every command of them, on the embedded model."""

import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import urllib.request

import pytest

from ernie_jax.cli import main

pytestmark = pytest.mark.usefixtures("quick_compiling")
ROOT = pathlib.Path(__file__).parents[2]
QUICK = ["--set=steps=2", "--set=warmup_steps=1", "--set=batch_size=1", "--set=evaluate_every=1"]


def commands(section: str) -> list[list[str]]:
    """Return the arguments of a section's commands."""
    text = (ROOT / "docs" / "training.md").read_text()
    section = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [shlex.split(line)[1:] for line in re.findall(r"^\$ python (main\.py .*)$", section, re.MULTILINE)]


def run(arguments, *more) -> None:
    with pytest.raises(SystemExit) as end:
        main(["main.py", *arguments, *more])
    assert not end.value.code


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    """The working directory of the commands."""
    monkeypatch.chdir(tmp_path)
    for name in ("models", "examples", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_from_a_file_to_a_served_adapter(folder, capsys):
    convert, data, train, generate, merge, serve = commands("From a JSONL file to a served adapter")
    run(convert)
    run(data)
    assert "[[" in capsys.readouterr().out  # what is learnt
    run(train, *QUICK)
    assert "held-out perplexity of chat" in capsys.readouterr().out
    assert json.loads((folder / "out/embedded-lora/metrics.jsonl").read_text().splitlines()[-1])["chat_loss"] > 0
    run(generate, "--max_new_tokens=4", "--cache_tokens=256", "--max_sequences=1")
    assert capsys.readouterr().out.startswith("Is the lamp")
    run(merge)
    assert (folder / "checkpoints/tuned/manifest.json").exists()

    program = [sys.executable, str(ROOT / "main.py"), *serve, "--port=0", "--nowarm_up", "--cache_tokens=256"]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
    try:
        url = next(found[1] for line in process.stderr if (found := re.search(r"serving embedded at (\S+)/v1", line)))
        body = {"model": "embedded", "prompt": "Is the lamp", "max_tokens": 2}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 2
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()


def test_a_preference_moves(folder, capsys):
    convert, *_ = commands("From a JSONL file to a served adapter")
    train, before, after = commands("Pairs of answers")
    run(convert)
    run(train, "--set=steps=3", "--set=warmup_steps=1", "--set=batch_size=1", "--set=evaluate_every=3")
    assert "held-out pairs of sums: 100.0% have the greater reward" in capsys.readouterr().out
    few = "--max_new_tokens=4", "--cache_tokens=512", "--max_sequences=8"
    for command in (before, after):
        run(command, *few)
    assert [len((folder / "out" / f"{name}.jsonl").read_text().splitlines()) for name in ("before", "after")] == [8, 8]
