"""Every bad source gives one clear sentence and leaves no target behind."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
from ernie_jax.errors import UserError
from tests.convert.foreign import DENSE, MOE, Model, write_index

SINGLE = "model.safetensors"


@pytest.fixture
def source(rng, tmp_path):
    return Model(MOE, rng, mtp=1).save(tmp_path / "hf")


@pytest.fixture
def sharded(rng, tmp_path):
    return Model(MOE, rng).save(tmp_path / "hf", 3)


@pytest.fixture
def refuse(tmp_path):
    def check(source, sentence, **options):
        target = tmp_path / "ours"
        with pytest.raises(UserError, match=sentence) as caught:
            convert.convert(str(source), str(target), **options)
        assert "\n" not in str(caught.value)
        assert not target.exists()

    return check


def change_config(directory, **changes):
    fields = json.loads((directory / "config.json").read_text())
    fields = {name: value for name, value in (fields | changes).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(fields))


def change_tensors(directory, change):
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def change_header(directory, change):
    """Rewrite the header of a one-file checkpoint; `change` takes and returns its text."""
    raw = (directory / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = change(raw[8 : 8 + length].decode()).encode()
    (directory / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])


def test_no_directory(tmp_path, refuse):
    refuse(tmp_path / "nowhere", "nowhere: no such directory, and not a hub id")


def test_not_a_model_directory(tmp_path, refuse):
    (tmp_path / "photos").mkdir()
    refuse(tmp_path / "photos", r"photos: not a model directory \(no config.json\)")


def test_a_file(source, refuse):
    refuse(source / SINGLE, "no such directory")


def test_already_converted(source, tmp_path, refuse):
    convert.convert(str(source), str(tmp_path / "done"))
    refuse(tmp_path / "done", "already converted")


def test_no_weights(source, refuse):
    (source / SINGLE).rename(source / "pytorch_model.bin")
    refuse(source, "neither model.safetensors.index.json nor model.safetensors; found only pytorch_model.bin")


def test_config_is_not_json(source, refuse):
    (source / "config.json").write_text("{,}")
    refuse(source, "config.json: not valid JSON")


def test_config_of_another_model(source, refuse):
    change_config(source, model_type="llama")
    refuse(source, "config.json: model_type is 'llama'")


def test_config_of_a_vision_model(source, refuse):
    change_config(source, model_type="ernie4_5_moe_vl")
    refuse(source, "vision model")


def test_missing_config_field(source, refuse):
    change_config(source, moe_k=None)
    refuse(source, "config.json: missing field moe_k")


def test_unknown_config_field(source, refuse):
    change_config(source, use_flux_capacitor=True)
    refuse(source, "config.json: unknown field use_flux_capacitor")


def test_config_of_another_size(source, refuse):
    change_config(source, num_hidden_layers=200)
    refuse(source, r"missing: model.layers.3.self_attn.o_proj.weight, .* and \d{4} more")


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_shard(source, kept, refuse):
    raw = (source / SINGLE).read_bytes()
    (source / SINGLE).write_bytes(raw[:kept])
    sentence = "not a safetensors file" if 0 <= kept < 8 else "truncated"
    refuse(source, f"{SINGLE}: .*{sentence}.*download it again")


def test_trailing_bytes(source, refuse):
    with (source / SINGLE).open("ab") as file:
        file.write(b"more")
    refuse(source, "4 bytes more than its header describes")


def test_garbage(source, refuse):
    (source / SINGLE).write_bytes(b"<html>404: the page was not found</html>")
    refuse(source, f"{SINGLE}: not a safetensors file")


@pytest.mark.parametrize(
    "old, new",
    [
        ('"shape":[96,48]', '"shape":[NaN,48]'),
        ('"shape":[96,48]', '"shape":[-96,-48]'),
        ('"shape":[96,48]', '"shape":[96.0,48]'),
        ('"shape":[96,48]', '"shape":[96,47]'),
        ('"dtype":"BF16"', '"type":"BF16"'),
        ('"data_offsets":[0,', '"data_offsets":[8,'),
        ('"data_offsets":[0,', '"data_offsets":[Infinity,'),
        ("}", ""),
    ],
)
def test_damaged_header(source, old, new, refuse):
    change_header(source, lambda text: text.replace(old, new, 1))
    refuse(source, f"{SINGLE}: damaged header .*download it again")


def test_header_with_a_gap(source, refuse):
    def forget_a_tensor(text):
        header = json.loads(text)
        del header["model.layers.1.mlp.gate.weight"]
        return json.dumps(header)

    change_header(source, forget_a_tensor)
    refuse(source, "damaged header .*gap or overlap")


def test_missing_shard(sharded, refuse):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refuse(sharded, "missing shard model-00002-of-00003.safetensors")


def test_shard_not_in_the_index(sharded, refuse):
    path = sharded / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    last = "model-00003-of-00003.safetensors"
    lost = [name for name, file in weight_map.items() if file == last]
    write_index(sharded, {name: file for name, file in weight_map.items() if file != last})
    refuse(sharded, rf"missing: .*{lost[0]}.*\(not in model.safetensors.index.json: {last}\)")


def test_index_names_the_wrong_shard(sharded, refuse):
    path = sharded / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    weight_map["model.norm.weight"] = next(f for f in weight_map.values() if f != weight_map["model.norm.weight"])
    write_index(sharded, weight_map)
    refuse(sharded, "index.json: tensors not in the shard that it names: model.norm.weight")


def test_tensor_in_two_shards(sharded, refuse):
    file = sharded / "model-00001-of-00003.safetensors"
    other = sharded / "model-00002-of-00003.safetensors"
    name, value = next(iter(load_file(file).items()))
    save_file(load_file(other) | {name: value}, other)
    refuse(sharded, f"tensor {name} is in both")


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{"])
def test_bad_index(sharded, index, refuse):
    (sharded / "model.safetensors.index.json").write_text(index)
    refuse(sharded, "model.safetensors.index.json")


def test_all_problems_together(source, refuse):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.2.mlp.experts.3.up_proj.weight"]
        tensors["model.layers.2.mlp.experts.4.up_proj.weight"] = np.zeros((2, 2), np.float32)
        tensors["model.rotary.inv_freq"] = np.zeros(4, np.float32)
        tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((48, 47), np.float32)
        tensors["model.embed_tokens.weight"] = np.zeros((96, 48), np.int64)

    change_tensors(source, spoil)
    refuse(
        source,
        "hf: the tensors do not fit config.json: "
        "missing: model.layers.2.mlp.experts.3.up_proj.weight, model.norm.weight; "
        "unexpected: model.layers.2.mlp.experts.4.up_proj.weight, model.rotary.inv_freq; "
        r"wrong shape: model.layers.0.self_attn.q_proj.weight is \[48, 47\], expected \[48, 48\]; "
        "wrong dtype: model.embed_tokens.weight is I64, expected BF16 or F16 or F32$",
    )


@pytest.mark.parametrize("dtype", ["U16", "F64", "F8_E4M3", "F4"])
def test_dtypes_that_are_not_read(source, dtype, refuse):
    """Also one that no release of the format knows yet, and in Hugging Face's layout Paddle's bfloat16."""
    size = {"U16": 2, "F64": 8, "F8_E4M3": 1, "F4": 2}[dtype]
    entry = '"model.norm.weight":{"dtype":"BF16","shape":[48]'
    change_header(source, lambda text: text.replace(entry, entry.replace("BF16", dtype).replace("48", str(96 // size))))
    refuse(source, f"wrong dtype: model.norm.weight is {dtype}")


def test_untied_without_a_head(rng, tmp_path, refuse):
    model = Model(DENSE, rng)
    model.fields["tie_word_embeddings"] = False
    refuse(model.save(tmp_path / "hf"), "missing: lm_head.weight")


def test_incomplete_mtp(source, refuse):
    change_tensors(source, lambda tensors: tensors.pop("model.mtp_emb_norm.0.weight"))
    refuse(source, "missing: model.mtp_emb_norm.0.weight")


def test_options(source, refuse):
    refuse(source, "dtype 'int8' is not one of bfloat16, float32, float16", dtype="int8")
    refuse(source, r"--host_memory_gb=0.1 is too little; the least for this model is 0\.\d", host_memory_gb=0.1)
    refuse(source, "--revision=main: only a hub id has revisions", revision="main")
