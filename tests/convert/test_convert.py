"""Converted parameters are the right bytes in the right places, and plain Orbax reads them."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

import convert
from convert import chunks, shards, table
from ernie_jax import checkpoint
from ernie_jax.config import ModelConfig
from ernie_jax.model import parameter_specs
from ernie_jax.sharding import single
from tests.convert.foreign import BF16, DENSE, MOE, Model, as_paddle, assert_same, write


def load(directory) -> dict[str, np.ndarray]:
    """Load parameters with nothing but Orbax, no shapes given."""
    with pytest.warns(UserWarning, match="Sharding info not provided"):
        return flatten_dict(ocp.load(directory / "params"), sep=".")


VARIANTS = {
    "moe": (MOE, {}),
    "mtp": (MOE, {"mtp": 1}),
    "two mtp layers": (MOE, {"mtp": 2}),
    "untied, no shared experts": (MOE | {"tie_word_embeddings": False, "moe_num_shared_experts": 0}, {}),
    "biases": (MOE | {"use_bias": True}, {"mtp": 1}),
    "dense": (DENSE, {}),
    "dense with biases": (DENSE | {"use_bias": True}, {}),
    "dense, untied": (DENSE | {"tie_word_embeddings": False}, {}),
    "float32": (MOE, {"dtype": np.float32}),
    "bfloat16 router": (MOE, {"router": BF16}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shards", [1, 3])
def test_parameters(variant, shards, rng, tmp_path):
    fields, options = VARIANTS[variant]
    model = Model(fields, rng, **options)
    source = model.save(tmp_path / "hf", shards)
    convert.convert(str(source), str(tmp_path / "ours"))
    assert_same(load(tmp_path / "ours"), model.parameters)

    config = checkpoint.read_config(tmp_path / "ours")
    assert {name: spec.shape for name, spec in parameter_specs(config).items()} == {
        name: value.shape for name, value in model.parameters.items()
    }
    assert config.num_nextn_predict_layers == options.get("mtp", 0)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "float32"])
@pytest.mark.parametrize("grouped", [False, True])
def test_paddle_layouts(variant, grouped, rng, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1000)  # so that a chunk takes some columns of a stored matrix
    fields, options = VARIANTS[variant]
    model = Model(fields, rng, **options)
    tensors = as_paddle(model, grouped)
    if not grouped:  # without bfloat16 in numpy, Paddle's files say U16; and its untied heads are [D, V]
        tensors = {name: x.view(np.uint16) if x.dtype == BF16 else x for name, x in tensors.items()}
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"] = np.ascontiguousarray(tensors["lm_head.weight"].T)
    write(tmp_path / "paddle", fields, tensors, shards=2)
    convert.convert(str(tmp_path / "paddle"), str(tmp_path / "ours"))
    assert_same(load(tmp_path / "ours"), model.parameters)
    assert convert.verify(str(tmp_path / "paddle"), str(tmp_path / "ours")) == []


@pytest.mark.parametrize("chunk_bytes", [64, 1000, 10_000])
def test_small_chunks(chunk_bytes, rng, tmp_path, monkeypatch):
    """Rows of every parameter are cut, unevenly too, and one expert is cut into several chunks."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
    model = Model(MOE | {"vocab_size": 97}, rng, mtp=1)
    convert.convert(str(model.save(tmp_path / "hf", 2)), str(tmp_path / "ours"))
    files = [file for file in (tmp_path / "ours/params/state").rglob("[0-9]*") if file.is_file()]
    assert len(files) > len(model.parameters)
    widest = 2 * 2 * max(MOE["hidden_size"], MOE["intermediate_size"])  # one row cannot be cut
    assert max(file.stat().st_size for file in files) <= max(chunk_bytes, widest)
    assert_same(load(tmp_path / "ours"), model.parameters)


@pytest.mark.parametrize("preset", sorted((pathlib.Path(__file__).parents[2] / "configs").glob("ernie*.json")))
def test_plan_of_the_real_models(preset):
    """No chunk is too large, even of a 7.5 GB stack; little is padding; and a chunk needs at most two 5 GB shards."""
    config = ModelConfig.from_file(preset)
    tensors, end = {}, 0
    for name, rule in table.expand(config).items():
        shape = list(rule.shapes)[-1]
        dtype, size = ("F32", 4) if ".router." in rule.parameter else ("BF16", 2)
        tensors[name] = shards.StoredTensor(name, dtype, shape, str(end // 5_000_000_000))
        end += math.prod(shape) * size
    placements, _ = table.place(config, tensors, "preset")
    shapes = {path: spec.shape for path, spec in parameter_specs(config).items()}
    parameters = chunks.plan_parameters(placements, shapes, table.parameter_dtypes(config, placements, None))
    listed = [chunk for parameter in parameters for chunk in parameter.chunks()]
    assert max(chunk.nbytes for chunk in listed) <= chunks.CHUNK_BYTES
    assert end == sum(chunk.count * chunk.parameter.dtype.itemsize for chunk in listed)
    assert sum(chunk.nbytes for chunk in listed) < 1.001 * end
    assert all(len(chunk.sources()) <= 2 for chunk in listed)
    stack = next((p for p in parameters if p.path.endswith("experts.gate_up.weight")), None)
    assert stack is None or stack.chunk_shape[0] == 1


def test_mixed_dtypes(rng, tmp_path):
    """Each tensor keeps its dtype; in one parameter the widest wins."""
    model = Model(MOE, rng)
    for name, tensor in model.tensors.items():
        if "norm" in name:
            model.tensors[name] = tensor.astype(np.float32)
    model.tensors["model.layers.0.self_attn.k_proj.weight"] = model.tensors[
        "model.layers.0.self_attn.k_proj.weight"
    ].astype(np.float32)
    expected = {
        name: value.astype(np.float32) if "norm" in name or name == "layers.0.attention.qkv.weight" else value
        for name, value in model.parameters.items()
    }
    convert.convert(str(model.save(tmp_path / "hf")), str(tmp_path / "ours"))
    assert_same(load(tmp_path / "ours"), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_dtype_flag(dtype, rng, tmp_path):
    model = Model(MOE, rng, dtype=np.float32)
    convert.convert(str(model.save(tmp_path / "hf")), str(tmp_path / "ours"), dtype=dtype)
    expected = {
        name: value if ".router." in name else value.astype(jnp.dtype(dtype))
        for name, value in model.parameters.items()
    }
    assert_same(load(tmp_path / "ours"), expected)
    assert checkpoint.read_manifest(tmp_path / "ours")["dtype"] == dtype


def test_transposed_mtp_projection(rng, tmp_path):
    model = Model(MOE, rng, mtp=1)
    name = "model.mtp_linear_proj.0.weight"
    model.tensors[name] = np.ascontiguousarray(model.tensors[name].T)
    convert.convert(str(model.save(tmp_path / "hf")), str(tmp_path / "ours"))
    assert_same(load(tmp_path / "ours"), model.parameters)


def test_stray_head_is_ignored(rng, tmp_path, capsys):
    model = Model(MOE, rng)
    model.tensors["lm_head.weight"] = model.tensors["model.embed_tokens.weight"].copy()
    convert.convert(str(model.save(tmp_path / "hf")), str(tmp_path / "ours"))
    assert "ignoring lm_head.weight: the head is tied" in capsys.readouterr().err
    assert_same(load(tmp_path / "ours"), model.parameters)


@pytest.mark.parametrize("configured, mtp", [(1, 0), (0, 1)])
def test_tensors_decide_about_mtp(configured, mtp, rng, tmp_path, capsys):
    model = Model(MOE | {"num_nextn_predict_layers": configured}, rng, mtp=mtp)
    convert.convert(str(model.save(tmp_path / "hf")), str(tmp_path / "ours"))
    assert f"num_nextn_predict_layers = {configured}, the checkpoint has tensors of {mtp}" in capsys.readouterr().err
    assert checkpoint.read_config(tmp_path / "ours").num_nextn_predict_layers == mtp


def test_self_contained(rng, tmp_path):
    model = Model(MOE, rng)
    source = model.save(tmp_path / "hf", 2)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "README.md").write_text("not copied")
    convert.convert(str(source), str(tmp_path / "ours"))
    names = {"config.json", "tokenizer.model", "chat_template.jinja"}
    assert {entry.name for entry in (tmp_path / "ours").iterdir()} == names | {"manifest.json", "params"}
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (source / name).read_bytes()
    manifest = json.loads((tmp_path / "ours/manifest.json").read_text())
    assert manifest["source"] == str(source)
    assert set(manifest["tensors"]) == set(model.tensors)
    files = {str(f.relative_to(tmp_path / "ours")) for f in (tmp_path / "ours").rglob("[0-9]*") if f.is_file()}
    assert set(manifest["checksums"]) == names | files


def test_sharded_load_and_metadata(rng, tmp_path):
    """Orbax's plain API loads into 8 shards, and its metadata has the dtypes and shapes."""
    model = Model(MOE | {"moe_num_experts": 8}, rng, mtp=1)
    convert.convert(str(model.save(tmp_path / "hf")), str(tmp_path / "ours"))
    mesh = jax.make_mesh((8,), ("x",))
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole if x.shape[0] % 8 else sharded)
        for name, x in model.parameters.items()
    }
    loaded = flatten_dict(ocp.load(tmp_path / "ours/params", unflatten_dict(abstract, sep=".")), sep=".")
    assert_same(loaded, model.parameters)
    experts = loaded["layers.1.mlp.experts.gate_up.weight"]
    assert [shard.data.shape[0] for shard in experts.addressable_shards] == [1] * 8
    metadata = flatten_dict(ocp.metadata(tmp_path / "ours/params").metadata, sep=".")
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in metadata.items()} == {
        name: (value.shape, value.dtype) for name, value in model.parameters.items()
    }


def test_metadata_is_what_orbax_writes(rng, tmp_path):
    """File by file, our metadata holds what Orbax writes when it saves the same arrays itself."""
    model = Model(MOE, rng, mtp=1)
    convert.convert(str(model.save(tmp_path / "hf")), str(tmp_path / "ours"))
    context = ocp.Context()
    context.array.saving.use_ocdbt = context.array.saving.use_zarr3 = context.array.saving.use_compression = False
    theirs, ours = tmp_path / "theirs", tmp_path / "ours" / "params"
    with context:
        ocp.save(theirs, unflatten_dict(jax.tree.map(jnp.asarray, model.parameters), sep="."))

    def read(path):
        value = json.loads(path.read_text())
        if path.name == "_CHECKPOINT_METADATA":
            value = {key: None if "timestamp" in key else entry for key, entry in value.items()}
        if path.name == "process_0":
            metadatas = [entry["array_metadata"] for entry in value["array_metadatas"]]
            value = {entry["param_name"]: entry | {"chunk_shape": None} for entry in metadatas}
        if path.name == ".zarray":
            value["chunks"] = None
        return value

    described = ["_CHECKPOINT_METADATA", "state/_METADATA", "state/_sharding", "state/array_metadatas/process_0"]
    described += [f"state/{name}/.zarray" for name in model.parameters]
    for name in described:
        assert read(ours / name) == read(theirs / name), name
    others = {p.name for p in theirs.iterdir()}
    assert {p.name for p in ours.iterdir()} == others


def test_restores_into_the_model(rng, tmp_path):
    from flax import nnx

    model = Model(MOE, rng, mtp=1)
    convert.convert(str(model.save(tmp_path / "hf", 2)), str(tmp_path / "ours"))
    restored = nnx.to_flat_state(nnx.state(checkpoint.restore(tmp_path / "ours", single())))
    assert_same({".".join(map(str, path)): leaf.get_value() for path, leaf in restored}, model.parameters)
