"""A model with quantised weights computes what the same model does with these weights written out."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ernie_jax import checkpoint
from ernie_jax.config import QUANTIZED_FORMS
from ernie_jax.engine import Engine, EngineOptions, SamplingParams
from ernie_jax.errors import UserError
from ernie_jax.llm import LLM
from ernie_jax.model import Ernie, initialize, parameter_specs
from ernie_jax.ops import Quantized, dequantize, form_of, quantize
from ernie_jax.sharding import make_layout, single

OPTIONS = EngineOptions(cache_tokens=1024, max_sequences=4, prefill_chunk=64, page_size=16)
LAYOUTS = [
    ("int8+", "expert+tensor", "expert:4,tensor:2", 8),
    ("int4", "tensor", "tensor:2", 2),
    ("int4", "expert+tensor", "expert:2,tensor:2", 4),
    ("int4", "exchange", "expert:4", 4),
]
PROMPTS = [list(range(5, 12)), list(range(250, 180, -1))]
FORMS = pytest.mark.parametrize("form", QUANTIZED_FORMS)


def rounded(config, form):
    """Return a config of a form; one that ends in + has the embedding in int8 too."""
    return dataclasses.replace(config, quantize=form.removesuffix("+"), quantize_embedding=form.endswith("+"))


def leaves(model) -> dict[str, nnx.Variable]:
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}


@pytest.fixture(scope="module")
def small(tiny_config):
    """Return a config whose every width is some of int4's groups."""
    return dataclasses.replace(tiny_config, num_hidden_layers=2, intermediate_size=1024, moe_intermediate_size=512)


@pytest.fixture(scope="module")
def pairs(small):
    """Return of each form a model's parameters, and those of one with the numbers that they stand for."""
    model = Ernie(small, jnp.float32)
    initialize(model, single(), seed=3, scale=0.1)
    exact = {name: np.asarray(leaf.get_value()) for name, leaf in leaves(model).items()}

    @functools.cache
    def pair(form):
        quantized, written_out = dict(exact), dict(exact)
        for name, spec in parameter_specs(rounded(small, form)).items():
            if stored := form_of(spec.dtype):
                scale = name.removesuffix("weight") + "scale"
                weight = quantize(exact[name], OUTPUTS.get(name.split(".")[-2], exact[name].ndim - 1), stored)
                quantized |= {name: weight.values, scale: weight.scales}
                written_out[name] = dequantize(weight)
        return quantized, written_out

    return pair


OUTPUTS = {"qkv": 3, "out": 1}


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


@FORMS
def test_what_is_quantised(form, small):
    specs = parameter_specs(dataclasses.replace(small, quantize=form, num_nextn_predict_layers=1))
    exact = parameter_specs(dataclasses.replace(small, num_nextn_predict_layers=1))
    kinds = {"attention.qkv", "attention.out", "mlp.gate_up", "mlp.down", "experts.gate_up", "experts.down"}
    kinds |= {"shared.gate_up", "shared.down"}
    found = {name for name, spec in specs.items() if form_of(spec.dtype) == form}
    assert {".".join(name.split(".")[-3:-1]) for name in found} == kinds
    for name in found:
        weight = Quantized(specs[name], specs[name.removesuffix("weight") + "scale"])
        assert weight.shape == exact[name].shape
    assert specs["layers.1.mlp.router.weight"].dtype == jnp.float32
    assert specs["embed.weight"].dtype == jnp.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_in_int8(tied, small):
    """The numbers of a model of its own, so that a tied head and one of its own are seen apart."""
    config = dataclasses.replace(rounded(small, "int4+"), tie_word_embeddings=tied)
    model = Ernie(config, jnp.float32)
    initialize(model, single(), seed=4)
    table = model.embed if tied else model.head
    tokens, hidden = jnp.arange(0, 320, 5), jax.random.normal(jax.random.key(1), (3, 64))
    rows, logits = jax.jit(lambda model: (model.embed(tokens), model.logits(hidden)))(model)
    np.testing.assert_allclose(rows, dequantize(model.embed.kernel)[tokens], rtol=1e-6)
    expected = np.asarray(hidden, np.float64) @ dequantize(table.kernel).astype(np.float64).T
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    found = {name for name, leaf in leaves(model).items() if leaf.dtype == jnp.int8}
    assert found == ({"embed.weight"} if tied else {"embed.weight", "head.weight"})
    assert model.embed.dtype == jnp.float32


@pytest.fixture(scope="module")
def alone(pairs, small):
    """Return of each form what a model on one device says to PROMPTS, and how it describes its ops."""

    @functools.cache
    def say(form):
        config = rounded(small, form)
        engine = Engine(fill(config, pairs(form)[0], single()), single(), OPTIONS)
        return engine.logits(PROMPTS[1]), generate(engine, PROMPTS), engine.describe_ops()

    return say


@pytest.mark.parametrize("form", [*QUANTIZED_FORMS, "int8+"])
def test_logits_and_tokens(form, pairs, small, alone):
    theirs = Engine(fill(small, pairs(form)[1], single()), single(), OPTIONS)
    logits, tokens, ops = alone(form)
    np.testing.assert_allclose(logits, theirs.logits(PROMPTS[1]), atol=1e-4)
    assert generate(theirs, PROMPTS) == tokens
    form = form.replace("+", " (int8 embedding)")
    assert f"{form} weights" in ops and form not in theirs.describe_ops()


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: "-".join(case[:2]))
def test_layouts(case, pairs, small, alone):
    form, preset, mesh, count = case
    config = rounded(small, form)
    layout = make_layout(config, jax.devices()[:count], mesh, preset)
    ours = Engine(fill(config, pairs(form)[0], layout), layout, OPTIONS)
    logits, tokens, _ = alone(form)
    np.testing.assert_allclose(ours.logits(PROMPTS[1]), logits, atol=1e-4)
    assert generate(ours, PROMPTS) == tokens


def test_int4_is_not_cut_within_a_group(small):
    config = dataclasses.replace(small, quantize="int4", moe_intermediate_size=256)
    sentence = r"shared experts in int4's groups of 128 \(4\) cannot be split 8 ways; tensor works on 1, 2, 4 devices"
    with pytest.raises(UserError, match=sentence):
        make_layout(config, jax.devices()[:8], "tensor:8", "tensor")


@FORMS
def test_saved_and_loaded_on_a_mesh(form, pairs, small, alone, tmp_path):
    config = dataclasses.replace(small, quantize=form)
    model = fill(config, pairs(form)[0], single())
    fields = json.dumps(dataclasses.asdict(small)).encode()
    checkpoint.save(tmp_path / "ours", model, {"config.json": fields}, "a test")
    expected = alone(form)[0]
    specs = parameter_specs(config)
    for dtype, tolerance in ((None, 1e-4), ("bfloat16", 0.2)):
        llm = LLM.load(tmp_path / "ours", dtype, mesh="expert:8", cache_tokens=1024)
        differences = np.abs(llm.logits(PROMPTS[1]) - expected).max(axis=1)
        # In bfloat16 a few tokens go to another expert.
        assert (np.median if dtype else np.max)(differences) < tolerance
        for name, leaf in leaves(llm.model).items():
            if name.endswith(".scale") or form_of(specs[name].dtype):
                assert leaf.dtype == specs[name].dtype
        assert leaves(llm.model)["embed.weight"].dtype == (dtype or "float32")


@FORMS
def test_random_weights_have_the_usual_spread(form, small):
    model = Ernie(dataclasses.replace(small, quantize=form), jnp.float32)
    initialize(model, single())
    layer = model.layers[1].mlp.experts.gate_up
    weight = dequantize(layer.kernel)
    assert weight.std() == pytest.approx(0.02, rel=0.02)
    assert abs(weight.mean()) < 1e-3


@FORMS
def test_backends_that_do_not_take_a_form_are_refused_at_the_start(form, pairs, small, monkeypatch):
    config = dataclasses.replace(small, quantize=form)
    options = dataclasses.replace(OPTIONS, expert_backend="gmm")
    monkeypatch.setattr(EngineOptions, "on", lambda self, platform: dataclasses.replace(self, mixed_chunk=32))
    with pytest.raises(UserError, match=f"expert backend gmm does not take {form} weights"):
        Engine(fill(config, pairs(form)[0], single()), single(), options)


def test_an_unknown_form(tiny_config):
    with pytest.raises(UserError, match="--quantize=int3: unknown; choose int8 or fp8 or int4"):
        dataclasses.replace(tiny_config, quantize="int3")
    with pytest.raises(UserError, match="--quantize_embedding goes with --quantize=int8 or fp8 or int4; add it"):
        dataclasses.replace(tiny_config, quantize_embedding=True)
