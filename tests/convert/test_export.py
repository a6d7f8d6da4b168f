"""Export gives back what was converted, bit for bit; and names for what was trained here."""

import dataclasses
import filecmp
import json

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import convert
from convert import arrays, exporter
from ernie_jax import checkpoint
from ernie_jax.errors import UserError
from ernie_jax.sharding import single
from tests.convert.foreign import BF16, DENSE, MOE, Model, as_paddle, assert_same, read_tensors, write

VARIANTS = {
    "moe": (MOE, {"mtp": 1}),
    "untied, no shared experts": (MOE | {"tie_word_embeddings": False, "moe_num_shared_experts": 0}, {}),
    "biases": (MOE | {"use_bias": True}, {"mtp": 2}),
    "dense": (DENSE, {}),
    "float32": (MOE, {"dtype": np.float32}),
    "float16": (MOE, {"dtype": np.float16}),
    "bfloat16 router": (MOE, {"router": BF16}),
}


def assert_same_files(found, expected):
    """Compare two model directories; of the index only what it maps."""
    names = sorted(entry.name for entry in expected.iterdir())
    assert sorted(entry.name for entry in found.iterdir()) == names
    for name in names:
        if name.endswith("index.json"):
            maps = [json.loads((folder / name).read_text())["weight_map"] for folder in (found, expected)]
            assert maps[0] == maps[1]
        else:
            assert filecmp.cmp(found / name, expected / name, shallow=False), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("slab_bytes", [300, 1 << 20])
def test_round_trip(variant, shards, slab_bytes, rng, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_SLAB_BYTES", slab_bytes)
    fields, options = VARIANTS[variant]
    source = Model(fields, rng, **options).save(tmp_path / "hf", shards)
    convert.convert(str(source), str(tmp_path / "ours"))
    convert.export(str(tmp_path / "ours"), str(tmp_path / "exported"))
    assert_same_files(tmp_path / "exported", source)


@pytest.mark.parametrize("grouped", [False, True])
def test_paddle_round_trip(grouped, rng, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_SLAB_BYTES", 300)
    model = Model(MOE | {"use_bias": True}, rng, mtp=1)
    tensors = as_paddle(model, grouped)
    if not grouped:
        tensors = {name: x.view(np.uint16) if x.dtype == BF16 else x for name, x in tensors.items()}
    write(tmp_path / "paddle", model.fields, tensors, shards=3)
    convert.convert(str(tmp_path / "paddle"), str(tmp_path / "ours"))
    convert.export(str(tmp_path / "ours"), str(tmp_path / "exported"))
    assert_same_files(tmp_path / "exported", tmp_path / "paddle")


def test_transposed_mtp_projection(rng, tmp_path):
    model = Model(MOE, rng, mtp=1)
    name = "model.mtp_linear_proj.0.weight"
    model.tensors[name] = np.ascontiguousarray(model.tensors[name].T)
    source = model.save(tmp_path / "hf")
    convert.convert(str(source), str(tmp_path / "ours"))
    convert.export(str(tmp_path / "ours"), str(tmp_path / "exported"))
    assert_same_files(tmp_path / "exported", source)


def test_widened_tensors_come_back_narrow(rng, tmp_path):
    source = Model(MOE, rng).save(tmp_path / "hf")
    convert.convert(str(source), str(tmp_path / "ours"), dtype="float32")
    convert.export(str(tmp_path / "ours"), str(tmp_path / "exported"))
    assert_same_files(tmp_path / "exported", source)


def test_narrowed_tensors_stay_narrow(rng, tmp_path, capsys):
    model = Model(MOE, rng, dtype=np.float32)
    convert.convert(str(model.save(tmp_path / "hf")), str(tmp_path / "ours"), dtype="bfloat16")
    convert.export(str(tmp_path / "ours"), str(tmp_path / "exported"))
    assert "tensors stay as --dtype narrowed them (such as" in capsys.readouterr().err
    expected = {
        name: value if "mlp.gate." in name or "moe_statics" in name else value.astype(ml_dtypes.bfloat16)
        for name, value in model.tensors.items()
    }
    assert_same(read_tensors(tmp_path / "exported"), expected)


def test_stray_head_is_not_written(rng, tmp_path, capsys):
    model = Model(MOE, rng)
    expected = dict(model.tensors)
    model.tensors["lm_head.weight"] = model.tensors["model.embed_tokens.weight"].copy()
    convert.convert(str(model.save(tmp_path / "hf")), str(tmp_path / "ours"))
    convert.export(str(tmp_path / "ours"), str(tmp_path / "exported"))
    assert "lm_head.weight was ignored by the conversion and is not written" in capsys.readouterr().err
    assert_same(read_tensors(tmp_path / "exported"), expected)


@pytest.fixture
def trained(tiny_model, tiny_config, tmp_path):
    names = {field.name for field in dataclasses.fields(tiny_config)} & (MOE.keys() | {"head_dim"})
    fields = MOE | {name: getattr(tiny_config, name) for name in names}
    checkpoint.save(tmp_path / "trained", tiny_model, {"config.json": json.dumps(fields).encode()}, source="trained")
    return tmp_path / "trained"


@pytest.mark.parametrize("shard_bytes", [exporter._SHARD_BYTES, 100_000])
def test_trained_here(trained, tiny_model, shard_bytes, tmp_path, monkeypatch):
    """A checkpoint that never was Hugging Face's becomes one, which converts to the same parameters."""
    monkeypatch.setattr(exporter, "_SHARD_BYTES", shard_bytes)
    exported = tmp_path / "exported"
    convert.export(str(trained), str(exported))
    shards = sorted(file.name for file in exported.glob("*.safetensors"))
    assert (shards == ["model.safetensors"]) == (shard_bytes > 1 << 20)
    assert "model.layers.1.mlp.experts.7.up_proj.weight" in read_tensors(exported)

    convert.convert(str(exported), str(tmp_path / "ours"))
    assert convert.verify(str(exported), str(trained)) == []
    restored = nnx.to_flat_state(nnx.state(checkpoint.restore(tmp_path / "ours", single())))
    expected = nnx.to_flat_state(nnx.state(tiny_model))
    assert_same(*({".".join(map(str, p)): np.asarray(x.get_value()) for p, x in t} for t in (restored, expected)))


def test_parameters_that_do_not_fit_the_config(trained, tmp_path):
    fields = json.loads((trained / "config.json").read_text()) | {"head_dim": 8}
    (trained / "config.json").write_text(json.dumps(fields))
    sentence = r"trained: layers.0.attention.out.weight is \[64, 2, 4, 16\], config.json says \[64, 2, 4, 8\]"
    with pytest.raises(UserError, match=sentence):
        convert.export(str(trained), str(tmp_path / "exported"))


@pytest.fixture
def ours(rng, tmp_path):
    convert.convert(str(Model(MOE, rng).save(tmp_path / "hf", 2)), str(tmp_path / "ours"))
    return tmp_path / "ours"


def test_target_exists(ours, tmp_path, rng):
    other = Model(DENSE, rng).save(tmp_path / "exported", 3)
    (other / "README.md").write_text("stays")
    with pytest.raises(UserError, match="exported: exists; pass --overwrite to replace the model in it"):
        convert.export(str(ours), str(other))
    convert.export(str(ours), str(other), overwrite=True)
    (other / "README.md").unlink()
    assert_same_files(other, tmp_path / "hf")


@pytest.mark.parametrize("name", ["ours", "photos"])
def test_target_is_something_else(ours, tmp_path, name):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_text("miaow")
    with pytest.raises(UserError, match=f"{name}: exists and is not a Hugging Face model directory"):
        convert.export(str(ours), str(tmp_path / name), overwrite=True)


def test_source_is_no_checkpoint(ours, tmp_path):
    with pytest.raises(UserError, match="hf: not an ernie_jax checkpoint"):
        convert.export(str(tmp_path / "hf"), str(tmp_path / "exported"))
    with pytest.raises(UserError, match="nowhere: no such directory"):
        convert.export(str(tmp_path / "nowhere"), str(tmp_path / "exported"))
    assert not (tmp_path / "exported").exists()


def test_missing_chunk(ours, tmp_path):
    (ours / "params/state/norm.weight/0").unlink()
    with pytest.raises(UserError, match="ours: parameter norm.weight is missing or damaged"):
        convert.export(str(ours), str(tmp_path / "exported"))
    assert {entry.name for entry in tmp_path.iterdir()} == {"hf", "ours"}


def test_interrupted_export_leaves_nothing(ours, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(exporter, "_write_index", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert.export(str(ours), str(tmp_path / "exported"))
    assert {entry.name for entry in tmp_path.iterdir()} == {"hf", "ours"}
    (tmp_path / ".exported.partial").mkdir()  # as a kill leaves it
    convert.export(str(ours), str(tmp_path / "exported"))
    assert {entry.name for entry in tmp_path.iterdir()} == {"hf", "ours", "exported"}
