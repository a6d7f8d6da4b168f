"""Runs that learn from pairs: what they write, and that they go on exactly wherever they ended."""

import dataclasses
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax import checkpoint
from ernie_jax.errors import UserError
from ernie_jax.model import Ernie, initialize
from ernie_jax.sharding import single
from ernie_jax.train import Recipe, run
from ernie_jax.train.data import PreferenceData

pytestmark = pytest.mark.usefixtures("quick_compiling")
ROOT = pathlib.Path(__file__).parents[2]
THINKING = ROOT / "models" / "ernie-embedded-thinking"


def save(directory, config, seed):
    model = Ernie(config, jnp.float32)
    initialize(model, single(), seed=seed, scale=0.1)
    model.norm.weight.set_value(model.norm.weight[...] * (1 + seed / 10))
    files = checkpoint.read_small_files(THINKING) | {"config.json": json.dumps(dataclasses.asdict(config)).encode()}
    checkpoint.save(directory, model, files, "test")


@pytest.fixture(scope="module")
def tiny(config, tmp_path_factory, quick_compiling):
    """A config with the vocabulary of the embedded model."""
    vocab = json.loads((THINKING / "config.json").read_text())["vocab_size"]
    return dataclasses.replace(config, vocab_size=vocab)


@pytest.fixture
def recipe(tiny, tmp_path) -> Recipe:
    """Adapters of random weights, pairs of which a step shows two or three."""
    save(tmp_path / "start", tiny, 1)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    return Recipe(
        checkpoint=str(tmp_path / "start"), data=str(tmp_path / "examples"), output=str(tmp_path / "whole"),
        sources={"sums": {"train": "preference.jsonl", "heldout": "preference_heldout.jsonl"}},
        steps=4, batch_size=1, sequence_length=256, learning_rate=1e-2, dtype="float32", lora_rank=2,
        lora_targets=["attention"], log_every=1, evaluate_every=2, save_every=2, preference={"sft_weight": 0.1},
    )  # fmt: skip


def logged(recipe) -> list[dict]:
    lines = (pathlib.Path(recipe.output) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def numbers(recipe) -> dict[str, np.ndarray]:
    with np.load(pathlib.Path(recipe.output) / "reference.npz") as file:
        return {name: file[name] for name in file.files if name != "made_of"}


def test_it_goes_on_bit_by_bit_and_computes_the_reference_once(recipe, tiny, tmp_path, monkeypatch):
    held = run(recipe, progress=False)["sums"]
    rows, whole = logged(recipe), numbers(recipe)
    assert rows[-1]["sums_loss"] == held["loss"] and rows[0]["tokens"] == 2 * 256
    assert {"train_reward_margin", "train_reward_accuracy", "train_chosen_logprob"} <= rows[0].keys()
    assert held["reward_margin"] == pytest.approx(held["chosen_reward"] - held["rejected_reward"])
    assert not np.isnan(whole["held-out sums"]).any() and whole["held-out sums"].shape == (8, 2)
    shown = ~np.isnan(whole["training"][:, 0])
    assert whole["training"].shape == (40, 2) and 4 <= shown.sum() < 40  # four steps show no more

    read = PreferenceData.batch
    cut = dataclasses.replace(recipe, output=str(tmp_path / "cut"))
    seen = []

    def end(at):
        def batch(data, step):
            seen.append(step)
            if len(seen) == at:
                raise KeyboardInterrupt
            return read(data, step)

        seen.clear()
        monkeypatch.setattr(PreferenceData, "batch", batch)
        with pytest.raises(KeyboardInterrupt):
            run(cut, progress=False)

    def refused(message):
        with pytest.raises(UserError, match=message):
            run(cut, progress=False)

    end(4)  # while the reference is computed, of which two batches are saved
    assert 0 < (~np.isnan(numbers(cut)["training"][:, 0])).sum() < shown.sum()
    file = tmp_path / "examples" / "preference.jsonl"
    lines = file.read_text()
    file.write_text(lines.replace("8+9", "9+8"))
    refused("preference.jsonl changed since .*reference.npz was computed with it; put the old one back")
    file.write_text(lines)
    (tmp_path / "start").rename(tmp_path / "put-away")
    save(tmp_path / "start", tiny, 2)
    refused("start changed since .*reference.npz was computed")
    shutil.rmtree(tmp_path / "start")
    (tmp_path / "put-away").rename(tmp_path / "start")
    end(4 + 4)  # in the last of the four steps
    assert seen == [0, 1, 2, 3] * 2
    seen.clear()
    monkeypatch.setattr(PreferenceData, "batch", lambda data, step: seen.append(step) or read(data, step))
    assert run(cut, progress=False)["sums"] == held
    assert seen == [0, 1, 2, 3, 2, 3]  # the first four see that all is known
    assert logged(cut) == rows
    for name, value in whole.items():
        np.testing.assert_array_equal(numbers(cut)[name], value)


def test_all_weights_without_a_reference(recipe):
    change = {"preference": {"variant": "simpo"}, "lora_rank": 0, "steps": 2}
    recipe = dataclasses.replace(recipe, **change)
    run(recipe, progress=False)
    output = pathlib.Path(recipe.output)
    assert checkpoint.is_checkpoint(output / "checkpoint") and not (output / "reference.npz").exists()
    first, last = logged(recipe)
    assert first["train_loss"] > 0 and last["sums_loss"] > 0


def test_pairs_and_single_answers_need_recipes_of_their_own(recipe):
    with pytest.raises(UserError, match="the sources hold pairs of answers, and the recipe has no field preference"):
        run(dataclasses.replace(recipe, preference=None), progress=False)
    chat = {"chat": {"train": "chat.jsonl"}}
    with pytest.raises(UserError, match="preference is for pairs of answers, and the sources hold one answer each"):
        run(dataclasses.replace(recipe, sources=chat, sequence_length=512), progress=False)
    assert not pathlib.Path(recipe.output).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preference": {"betta": 0.1}}, "preference has no betta; it has variant, beta"),
        ({"preference": 0.1}, "preference must be a table, found 0.1"),
        ({"preference": {"beta": "much"}}, "recipe field preference.beta must be a number, found 'much'"),
        ({"mtp_weight": 0.3}, "mtp_weight is for training on one answer each"),
        ({"token_balanced": True}, "token_balanced is for training on one answer each"),
        ({"checkpoint": "", "model": "m"}, "preference starts from a model that answers: give checkpoint"),
    ],
)
def test_bad_fields(started, change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(started, **{"preference": {}, **change})
