"""ModelConfig: what a config.json of the family may look like, and the sentences for those that may not."""

import json
import math
import pathlib

import pytest

from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.model import parameter_specs

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def fields(name="ernie-4.5-21b-a3b-thinking", **changes):
    return {**json.loads((CONFIGS / f"{name}.json").read_text()), **changes}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # The 21B count equals what the hub reports for the Thinking checkpoint, to the last parameter.
        ("ernie-4.5-21b-a3b-thinking", 21_825_437_888),
        ("ernie-4.5-21b-a3b", 21_825_437_888 + 123_217_920),
        ("ernie-4.5-0.3b", 360_748_032),
        ("ernie-4.5-300b-a47b", 299_484_163_264 + 989_888_512),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, parameters):
    specs = parameter_specs(ModelConfig.from_file(CONFIGS / f"{name}.json"))
    assert sum(math.prod(spec.shape) for spec in specs.values()) == parameters
    assert {str(s.dtype) for n, s in specs.items() if ".router." in n} <= {"float32"}
    assert {str(s.dtype) for n, s in specs.items() if ".router." not in n} == {"bfloat16"}


def test_moe_layers():
    config = ModelConfig.from_hf(fields())
    assert [i for i in range(28) if config.is_moe_layer(i)] == list(range(1, 28))
    config = ModelConfig.from_hf(fields(moe_layer_interval=2, moe_layer_start_index=3, moe_layer_end_index=9))
    assert [i for i in range(28) if config.is_moe_layer(i)] == [3, 5, 7, 9]
    dense = ModelConfig.from_hf(fields("ernie-4.5-0.3b"))
    assert not any(dense.is_moe_layer(i) for i in range(18))
    assert dense.head_dim == 128


def test_forms_that_published_files_take():
    absent = fields()
    del absent["moe_layer_end_index"], absent["rope_theta"], absent["num_key_value_heads"]
    config = ModelConfig.from_hf(absent | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}})
    assert (config.moe_layer_end_index, config.rope_theta, config.num_key_value_heads) == (27, 1e4, 20)
    baidu = {"moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_use_aux_free": True, "fuse_rms_norm": True}
    assert ModelConfig.from_hf(fields(**baidu, moe_layer_end_index=-1, eos_token_id=[2, 5])).eos_token_id == 2
    paddle = fields(architectures=["Ernie4_5_MoeForCausalLM"], model_type=None, add_tail_layers=2, use_fast_ln=True)
    assert ModelConfig.from_hf(paddle).model_type == "ernie4_5_moe"
    assert ModelConfig.from_hf(fields(rope_scaling=None, moe_gate_act=None, unheard_of=None))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', not an ERNIE 4.5 text model"),
        ({"model_type": "ernie4_5_moe_vl"}, "is a vision model"),
        ({"hidden_size": None, "moe_k": None}, "missing fields hidden_size, moe_k"),
        ({"sliding_window": 4096}, "unknown field sliding_window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling asks for 'yarn'"),
        ({"moe_gate_act": "sigmoid"}, "moe_gate_act is 'sigmoid'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": "2560"}, "field hidden_size must be int, found '2560'"),
        ({"use_bias": 1}, "field use_bias must be bool"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"moe_k": 65}, "moe_k .65. exceeds moe_num_experts"),
        ({"head_dim": 127}, "head_dim is 127"),
    ],
)
def test_bad_configs_name_the_file_and_the_field(changes, sentence):
    with pytest.raises(UserError, match=f"some/config.json: .*{sentence}"):
        ModelConfig.from_hf(fields(**changes), "some/config.json")


@pytest.mark.parametrize(("text", "sentence"), [("{", "not valid JSON"), ("[1]", "expected a JSON object, found list")])
def test_bad_files(tmp_path, text, sentence):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=sentence):
        ModelConfig.from_file(tmp_path / "config.json")
    with pytest.raises(UserError, match="no such file"):
        ModelConfig.from_file(tmp_path / "nothing.json")
