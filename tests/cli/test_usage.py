"""Commands, flags and help."""

import importlib
import shlex
import subprocess
import sys

import pytest
from absl import flags

from ernie_jax import cli
from ernie_jax.sharding import PRESETS

COMMANDS = list(cli.COMMANDS)


def command(word):
    return getattr(importlib.import_module(f"ernie_jax.cli.{cli.COMMANDS[word][0]}"), word.upper())


@pytest.mark.parametrize("arguments", [(), ("help",), ("--help",), ("-h",)])
def test_help_lists_the_commands(run, arguments):
    result = run(*arguments)
    assert (result.code, result.err) == (0, "")
    for word, (_, summary) in cli.COMMANDS.items():
        assert f"  {word} " in result.out and summary in result.out


@pytest.mark.parametrize("word", COMMANDS)
def test_help_of_a_command_shows_its_own_flags(run, word):
    result = run(word, "--help")
    assert (result.code, result.err) == (0, "")
    values = flags.FlagValues()
    command(word).define(values)
    shown = {line.split()[0].removeprefix("--[no]").strip("-=") for line in result.out.splitlines() if "  --" in line}
    assert shown == set(values)
    assert all(len(line) <= 110 for line in result.out.split("examples:")[0].splitlines())
    assert run("help", word).out == result.out


@pytest.mark.parametrize("word", COMMANDS)
def test_examples_parse(word):
    for example in command(word).examples:
        values = flags.FlagValues()
        command(word).define(values)
        program, first, *rest = shlex.split(example)
        assert (program, first) == ("main.py", word)
        assert values([word, *rest]) == [word]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate"], ["unknown command 'frobnicate'", "generate"]),
        (["help", "frobnicate"], ["unknown command 'frobnicate'"]),
        (["generate", "--frobnicate=1"], ["frobnicate", "main.py generate --help"]),
        (["info", "--model"], ["--model", "main.py info --help"]),
        (["generate", "--temperature=hot"], ["--temperature=hot"]),
        (["info", "ernie-4.5-0.3b"], ["'ernie-4.5-0.3b'", "--name=value"]),
        (["info"], ["give --model", "preset"]),
        (["generate", "--prompt=x"], ["give --model", "preset"]),
        (["chat"], ["give --model"]),
        (["score"], ["give --input", "give --output"]),
        (["score", "--input=x"], ["give --output"]),
        (["convert", "--source=x"], ["give --target"]),
        (["export"], ["give --source", "give --target"]),
        (["verify", "--target=x"], ["give --source"]),
        (["train"], ["give --config"]),
        (["generate", "--model=x"], ["either --prompt or --input"]),
        (["generate", "--model=x", "--prompt=a", "--input=b", "--output=c"], ["either --prompt or --input"]),
        (["generate", "--model=x", "--input=b"], ["--input and --output go together"]),
        (["generate", "--model=x", "--prompt=b", "--output=c"], ["--input and --output go together"]),
    ],
)
def test_bad_usage_exits_with_2_in_one_sentence(run, arguments, words):
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert all(word in result.err for word in words), result.err


def test_help_names_every_sharding(capsys):
    with pytest.raises(SystemExit):
        cli.main(["main.py", "generate", "--help"])
    out = capsys.readouterr().out
    assert all(preset in out for preset in PRESETS)


def test_help_needs_no_jax():
    program = (
        "import sys; from ernie_jax.cli import main\n"
        "try: main(sys.argv)\n"
        "finally: print(sorted({'jax', 'flax', 'orbax'} & set(sys.modules)))"
    )
    for arguments in (["help"], ["generate", "--help"]):
        out = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
        assert "--prompt" in out.stdout or "generate" in out.stdout
        assert out.stdout.endswith("[]\n")
