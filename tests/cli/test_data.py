"""data."""

import json
import sys

import pytest

from tests.cli.conftest import ROOT

MODEL = ROOT / "models" / "ernie-embedded-thinking"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'model = "{MODEL}"\ndata = "{ROOT / "examples"}"\noutput = "out"\n'
        "steps = 20\nbatch_size = 2\nsequence_length = 1024\nlearning_rate = 1e-3\n"
        '[sources]\nchat = { train = "chat.jsonl", heldout = "chat_heldout.jsonl" }\n'
        'poems = { train = "text.jsonl", times = 2 }\n'
    )
    return path


def test_what_a_recipe_trains_on_is_shown(run, recipe):
    result = run("data", f"--config={recipe}")
    assert (result.code, result.err) == (0, "")
    files, epoch, *examples = result.out.strip().split("\n\nstep ")[0].split("\n\n") + result.out.split("\n\nstep ")[1:]
    assert [line.split("/")[-1].split(", ")[:2] for line in files.splitlines()] == [
        ["chat.jsonl: messages", "36 lines"],
        ["chat_heldout.jsonl: messages", "8 lines"],
        ["text.jsonl: text", "6 lines"],
    ]
    assert "poems          2             766     6.2%" in epoch and "% full: 7 steps of 2 rows; " in epoch
    assert epoch.endswith("the recipe ends in epoch 3, after 20 steps")
    assert len(examples) == 3
    for number, example in enumerate(examples):
        head, text = example.split("\n", 1)
        assert head.startswith(f"0, row 0, segment {number}: ")
        if ": chat," in head or " chat," in head:
            shown, _, rest = text.partition("<think>\n[[")
            answer, _, end = rest.partition("]]")
            assert shown.startswith("<|im_start|>system") and answer.endswith("<|im_end|>") and end.strip() == "</s>"
    assert len(run("data", f"--config={recipe}", "--examples=0").out) < len(result.out) / 2


def test_what_is_learnt_is_green_on_a_terminal(run, recipe, monkeypatch):
    plain = run("data", f"--config={recipe}").out
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda file: True)
    coloured = run("data", f"--config={recipe}").out
    assert coloured.replace("\x1b[32m", "[[").replace("\x1b[0m", "]]") == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert run("data", f"--config={recipe}").out == plain


def test_pairs_are_shown_side_by_side(run, recipe):
    result = run("data", f"--config={recipe}", "--set=sources={p={train='preference.jsonl'}}", "--examples=1")
    assert result.code == 0 and "preference, 40 lines, 40 pairs" in result.out
    assert ", chosen: " in result.out and ", rejected: " in result.out and result.out.count("]]</s>") == 2


def test_every_bad_line_is_told(run, recipe, tmp_path):
    good = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "id": 7}
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in (good, {"messages": []}, good, 3)))
    arguments = f"--config={recipe}", f"--set=sources={{b={{train='{path}'}}}}"
    result = run("data", *arguments)
    assert result.code == 1
    assert "  2 bad lines:\n  line 2: messages must be a list of at least one message\n  line 4: not a" in result.out
    assert "  field id is not used (in 2 lines)" in result.out and "step 0, row 0, segment 1: b, line " in result.out
    result = run("train", *arguments)
    assert (result.code, result.out) == (1, "") and result.err.startswith(f"error: {path}, line 2: messages must be")
    result = run("data", *arguments, "--set=sequence_length=8")
    assert result.code == 1 and "rows have 8" in result.out and "can be learnt from" in result.err


def test_bad_usage(run, recipe):
    assert run("data").code == 2
    assert run("data", f"--config={recipe}", "--examples=-1").code == 2
    assert run("data", "--config=missing.toml").code == 1


@pytest.mark.parametrize("command", ["data", "train"])
@pytest.mark.parametrize(("field", "words"), [("checkpoint", "convert --source=... --target=away"), ("model", "name")])
def test_a_model_that_is_not_there(run, recipe, command, field, words):
    other = {"checkpoint": "model", "model": "checkpoint"}[field]
    result = run(command, f"--config={recipe}", f"--set={other}=", f"--set={field}=away")
    assert result.code == 1 and result.err.count("\n") == 1
    assert result.err.startswith(f"error: recipe field {field} is away: no such directory; ") and words in result.err
