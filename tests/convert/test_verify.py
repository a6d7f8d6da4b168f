"""verify finds every kind of difference and names it."""

import json

import ml_dtypes
import numpy as np
import pytest

import convert
from ernie_jax.errors import UserError
from tests.convert.foreign import MOE, Model


@pytest.fixture
def source(rng, tmp_path):
    return Model(MOE, rng, mtp=1).save(tmp_path / "hf", 3)


@pytest.fixture
def ours(source, tmp_path):
    convert.convert(str(source), str(tmp_path / "ours"))
    return tmp_path / "ours"


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_equal(source, ours, capsys):
    assert convert.verify(str(source), str(ours)) == []
    assert "verify: 100%" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_equal_up_to_the_dtype_asked_for(source, tmp_path, dtype):
    convert.convert(str(source), str(tmp_path / "ours"), dtype=dtype)
    assert convert.verify(str(source), str(tmp_path / "ours")) == []


def test_one_bit(source, ours):
    flip(ours / "params/state/layers.1.mlp.experts.gate_up.weight/2.0.0.0", 2 * 48 * 24 + 11)
    assert convert.verify(str(source), str(ours)) == [
        "params/state/layers.1.mlp.experts.gate_up.weight/2.0.0.0: checksum differs",
        "model.layers.1.mlp.experts.2.up_proj.weight: 1 of 1152 values differ in layers.1.mlp.experts.gate_up.weight",
    ]


def test_missing_chunk(source, ours):
    (ours / "params/state/norm.weight/0").unlink()
    first, second = convert.verify(str(source), str(ours))
    assert first == "params/state/norm.weight/0: missing"
    assert second.startswith(f"model.norm.weight: {ours}: parameter norm.weight is missing or damaged (")


def test_missing_parameter(source, ours):
    (ours / "params/state/norm.weight/.zarray").unlink()
    with pytest.raises(UserError, match="ours: parameter norm.weight is missing or damaged"):
        convert.verify(str(source), str(ours))


def test_small_files(source, ours):
    (ours / "tokenizer.model").unlink()
    (source / "generation_config.json").write_text("{}")
    (ours / "config.json").write_text((ours / "config.json").read_text() + " ")
    assert convert.verify(str(source), str(ours)) == [
        "config.json: differs",
        "generation_config.json: missing",
        "tokenizer.model: missing",
        "config.json: checksum differs",
        "tokenizer.model: missing",
    ]


def test_another_model(rng, ours, tmp_path):
    other = Model(MOE, rng, mtp=1).save(tmp_path / "other")
    differences = convert.verify(str(other), str(ours))
    named = {difference.split(":")[0] for difference in differences}
    assert named == set(json.loads((ours / "manifest.json").read_text())["tensors"])


def test_other_shapes(rng, ours, tmp_path):
    other = Model(MOE | {"vocab_size": 90}, rng).save(tmp_path / "other")
    differences = convert.verify(str(other), str(ours))
    assert "embed.weight: bfloat16 [96, 48], expected bfloat16 [90, 48]" in differences
    assert "mtp.0.proj.weight: bfloat16 [48, 96], expected nothing" in differences


def test_narrowed_router(source, ours):
    """A router that some other tool stored in bfloat16."""
    array = ours / "params/state/layers.1.mlp.router.weight"
    values = np.fromfile(array / "0.0", np.float32).astype(ml_dtypes.bfloat16)
    values.tofile(array / "0.0")
    described = json.loads((array / ".zarray").read_text())
    (array / ".zarray").write_text(json.dumps(described | {"dtype": "bfloat16"}))
    differences = convert.verify(str(source), str(ours))
    assert "layers.1.mlp.router.weight: bfloat16 [4, 48], expected float32 [4, 48]" in differences


def test_bad_arguments(source, ours, tmp_path):
    with pytest.raises(UserError, match="ours: already converted"):
        convert.verify(str(ours), str(ours))
    with pytest.raises(UserError, match="hf: not an ernie_jax checkpoint"):
        convert.verify(str(source), str(source))
