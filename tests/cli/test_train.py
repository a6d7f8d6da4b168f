"""train."""

import dataclasses
import json

import numpy as np
import pytest

from ernie_jax import checkpoint


@pytest.fixture
def recipe(tmp_path, tiny_config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(tiny_config, num_hidden_layers=2, moe_layer_end_index=-1)
    for name in ("model", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    tokens = np.concatenate([[*range(start, start + 12), 2] for start in range(3, 99)]).astype(np.uint16)
    for split in ("train", "heldout"):
        np.save(tmp_path / "data" / f"counting.{split}.npy", tokens)
    path = tmp_path / "recipe.toml"
    path.write_text(
        'model = "model"\ndata = "data"\noutput = "out"\nsources = { counting = 1 }\n'
        "steps = 2\nbatch_size = 2\nsequence_length = 32\nlearning_rate = 1e-3\n"
    )
    return path


def test_a_recipe_is_trained_without_noise(run, recipe, tmp_path, caplog):
    result = run("train", f"--config={recipe}", "--set=steps=3", "--set=output=elsewhere")
    assert result.code == 0
    assert result.out.startswith("held-out perplexity of counting: ") and result.out.count("\n") == 1
    assert "3/3" in result.err and caplog.records == []
    assert checkpoint.is_checkpoint(tmp_path / "elsewhere" / "checkpoint")
    assert not (tmp_path / "out").exists()


def test_bad_recipes_are_one_sentence(run, recipe):
    for arguments, words in (
        (["--config=missing.toml"], "missing.toml"),
        ([f"--config={recipe}", "--set=frob=1"], "frob"),
        ([f"--config={recipe}", "--set=steps"], "steps"),
    ):
        result = run("train", *arguments)
        assert (result.code, result.out) == (1, "") and result.err.count("\n") == 1 and words in result.err
