"""A model with int8 weights computes what the same model does with these weights written out."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ernie_jax import checkpoint
from ernie_jax.engine import Engine, EngineOptions, SamplingParams
from ernie_jax.errors import UserError
from ernie_jax.llm import LLM
from ernie_jax.model import Ernie, parameter_specs
from ernie_jax.ops import Quantized, dequantize, quantize
from ernie_jax.sharding import make_layout, single

OPTIONS = EngineOptions(cache_tokens=1024, max_sequences=4, prefill_chunk=64, page_size=16)
LAYOUTS = [
    ("tensor", "tensor:8", 8),
    ("expert", "expert:8", 8),
    ("expert+tensor", "expert:4,tensor:2", 8),
    ("exchange", "expert:8", 8),
]


def leaves(model) -> dict[str, nnx.Variable]:
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}


@pytest.fixture(scope="module")
def pair(tiny_config, tiny_model):
    """Return the parameters of the tiny model with int8 weights, and of one with the numbers that they stand for."""
    small, written_out = {}, {}
    specs = parameter_specs(dataclasses.replace(tiny_config, quantize="int8"))
    for name, leaf in leaves(tiny_model).items():
        small[name] = written_out[name] = np.asarray(leaf.get_value())
        if specs[name].dtype == jnp.int8:
            scale = name.removesuffix("weight") + "scale"
            weight = quantize(small[name], len(specs[scale].shape))
            small |= {name: weight.values, scale: weight.scales}
            written_out[name] = dequantize(weight)
    return small, written_out


def fill(config, arrays, layout) -> Ernie:
    model = Ernie(config, jnp.float32)
    for name, leaf in leaves(model).items():
        leaf.set_value(layout.put(arrays[name], leaf.get_metadata("axes")))
    return model


def generate(engine, prompts):
    for prompt in prompts:
        engine.submit(prompt, SamplingParams(max_new_tokens=8, temperature=0.0))
    tokens = {}
    while engine.has_work:
        for event in engine.step():
            tokens.setdefault(event.request, []).append(event.token)
    return [tokens[request] for request in sorted(tokens)]


def test_what_is_quantised(tiny_config):
    specs = parameter_specs(dataclasses.replace(tiny_config, quantize="int8", num_nextn_predict_layers=1))
    kinds = {"attention.qkv", "attention.out", "mlp.gate_up", "mlp.down", "experts.gate_up", "experts.down"}
    kinds |= {"shared.gate_up", "shared.down"}
    small = {name for name, spec in specs.items() if spec.dtype == jnp.int8}
    assert {".".join(name.split(".")[-3:-1]) for name in small} == kinds
    for name in small:
        scale = specs[name.removesuffix("weight") + "scale"]
        assert scale.dtype == jnp.float32 and scale.shape == specs[name].shape[: len(scale.shape)]
    assert specs["layers.1.mlp.router.weight"].dtype == jnp.float32
    assert specs["embed.weight"].dtype == jnp.bfloat16


def test_logits_and_tokens(pair, tiny_config, rng):
    config = dataclasses.replace(tiny_config, quantize="int8")
    ours = Engine(fill(config, pair[0], single()), single(), OPTIONS)
    theirs = Engine(fill(tiny_config, pair[1], single()), single(), OPTIONS)
    prompts = [rng.integers(3, 300, length).tolist() for length in (5, 40, 90)]
    for prompt in prompts:
        np.testing.assert_allclose(ours.logits(prompt), theirs.logits(prompt), atol=1e-4)
    assert generate(ours, prompts) == generate(theirs, prompts)
    assert "int8 weights: XLA's backends" in ours.describe_ops() and "int8" not in theirs.describe_ops()


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case[0])
def test_layouts(case, pair, tiny_config, rng):
    preset, mesh, count = case
    config = dataclasses.replace(tiny_config, quantize="int8")
    layout = make_layout(config, jax.devices()[:count], mesh, preset)
    ours = Engine(fill(config, pair[0], layout), layout, OPTIONS)
    alone = Engine(fill(config, pair[0], single()), single(), OPTIONS)
    prompts = [rng.integers(3, 300, length).tolist() for length in (7, 70)]
    np.testing.assert_allclose(ours.logits(prompts[1]), alone.logits(prompts[1]), atol=1e-4)
    assert generate(ours, prompts) == generate(alone, prompts)


def test_saved_and_loaded_on_a_mesh(pair, tiny_config, tmp_path, rng):
    config = dataclasses.replace(tiny_config, quantize="int8")
    model = fill(config, pair[0], single())
    fields = json.dumps(dataclasses.asdict(tiny_config)).encode()
    checkpoint.save(tmp_path / "ours", model, {"config.json": fields}, "a test")
    prompt = rng.integers(3, 300, 30).tolist()
    expected = Engine(model, single(), OPTIONS).logits(prompt)
    for dtype, tolerance in ((None, 1e-4), ("bfloat16", 0.2)):
        llm = LLM.load(tmp_path / "ours", dtype, mesh="expert:8", cache_tokens=1024)
        np.testing.assert_allclose(llm.logits(prompt), expected, atol=tolerance)
        found = leaves(llm.model)
        assert {str(leaf.dtype) for name, leaf in found.items() if name.endswith(".scale")} == {"float32"}
        assert found["layers.1.mlp.experts.gate_up.weight"].dtype == jnp.int8
        assert found["embed.weight"].dtype == (dtype or "float32")


def test_random_weights_have_the_usual_spread(tiny_config):
    llm = LLM.random(dataclasses.replace(tiny_config, quantize="int8"), "float32", cache_tokens=128)
    layer = llm.model.layers[1].mlp.experts.gate_up
    weight = dequantize(Quantized(layer.weight[...], layer.scale[...]))
    assert weight.std() == pytest.approx(0.02, rel=0.02)
    assert np.isfinite(llm.logits([5, 6, 7])).all()


@pytest.mark.parametrize("option", ["linear", "halves", "expert"])
def test_backends_that_do_not_take_int8_are_refused_at_the_start(option, pair, tiny_config, monkeypatch):
    config = dataclasses.replace(tiny_config, quantize="int8")
    options = dataclasses.replace(OPTIONS, **{f"{option}_backend": "cuda"})
    monkeypatch.setattr(EngineOptions, "on", lambda self, platform: dataclasses.replace(self, mixed_chunk=32))
    with pytest.raises(UserError, match=f"{option} backend cuda does not take int8 weights"):
        Engine(fill(config, pair[0], single()), single(), options)


def test_an_unknown_form(tiny_config):
    with pytest.raises(UserError, match="--quantize=int3: unknown; choose int8"):
        dataclasses.replace(tiny_config, quantize="int3")
