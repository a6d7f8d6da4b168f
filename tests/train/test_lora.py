"""Adapters: they compute what merged weights do, learn what those would, and are refused by other models."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ernie_jax import adapter, checkpoint
from ernie_jax.cli import main
from ernie_jax.errors import UserError
from ernie_jax.llm import LLM
from ernie_jax.lora import TARGETS
from ernie_jax.model import Ernie, initialize
from ernie_jax.model.adapters import add
from ernie_jax.ops import Adapted, dequantize, einsum, quantize
from ernie_jax.sharding import single
from ernie_jax.train import run
from ernie_jax.train.trainer import Trainer
from ernie_jax.train.weights import Weights, flat, read_config

pytestmark = pytest.mark.usefixtures("quick_compiling")
SIZE = {"cache_tokens": 256, "max_sequences": 2}


@pytest.fixture(scope="module")
def lora(started):
    return dataclasses.replace(started, lora_rank=4, lora_alpha=8.0, lora_rank_stabilised=True, lora_plus=3.0)


@pytest.fixture(scope="module")
def trained(lora, tmp_path_factory):
    """A run of two steps, the directory of whose adapter is what tests use."""
    output = tmp_path_factory.mktemp("lora")
    change = {"output": str(output), "steps": 2, "evaluate_every": 1, "lora_targets": ["attention", "routed"]}
    run(dataclasses.replace(lora, **change), progress=False)
    return output / "adapter"


@pytest.mark.parametrize("subscripts", ["td,exfd->texf", "tef,edf->etd", "nbd,nxfd->nbxf", "nbf,ndf->nbd"])
def test_a_product_with_an_adapter_is_that_with_the_sum(subscripts, rng):
    sizes = {"t": 5, "b": 5, "e": 3, "n": 3, "d": 8, "f": 6, "x": 2}
    x, weight = (rng.normal(size=[sizes[s] for s in part]) for part in subscripts.split("->")[0].split(","))
    down = rng.normal(size=(weight.shape[0], 2, weight.shape[-1]))
    up = rng.normal(size=(*weight.shape[:-1], 2))
    x, weight, down, up = (jnp.asarray(array, jnp.float32) for array in (x, weight, down, up))
    expected = jnp.einsum(subscripts, x, weight + jnp.einsum("e...r,erd->e...d", up, down))
    np.testing.assert_allclose(einsum(subscripts, x, Adapted(weight, down, up)), expected, atol=1e-4)
    np.testing.assert_allclose(einsum(subscripts, x, add(weight, down, up)), expected, atol=1e-4)


@pytest.mark.parametrize("backend", ["dense", "blocks", "batched"])
def test_gradients_are_those_that_merged_weights_imply(lora, started, config, batch, backend, rng):
    """Of W + s b a the gradient G gives s b^T G for a and s G a^T for b."""
    recipes = [dataclasses.replace(recipe, expert_backend=backend, frozen=[]) for recipe in (lora, started)]
    ours, whole = (Trainer(recipe, config, single()) for recipe in recipes)
    state = ours.initial_state()
    assert {name.rpartition(".")[2] for name in state.parameters} == {"lora_a", "lora_b"}
    assert not any(np.asarray(value).any() for name, value in state.parameters.items() if name.endswith("lora_b"))
    adapters = {n: jnp.asarray(rng.normal(size=v.shape, scale=0.1), v.dtype) for n, v in state.parameters.items()}
    scale, merged, pairs = 8.0 / np.sqrt(4), dict(state.frozen), {}
    for name in (name for name in adapters if name.endswith("lora_a")):
        path = name.removesuffix("lora_a")
        pairs[path + "weight"] = down, up = adapters[name], scale * adapters[path + "lora_b"]
        merged[path + "weight"] = add(merged[path + "weight"], down, up)

    def losses(trainer, frozen):
        return jax.jit(jax.value_and_grad(lambda w: trainer._sums(Weights(w, frozen), batch).objective.loss))

    loss, found = losses(ours, state.frozen)(adapters)
    other, gradients = losses(whole, {})(merged)
    np.testing.assert_allclose(loss, other, rtol=1e-5)
    for name, (down, up) in pairs.items():
        path = name.removesuffix("weight")
        _, pull = jax.vjp(lambda down, up, name=name: add(merged[name], down, up), down, up)
        of_down, of_up = pull(gradients[name])
        np.testing.assert_allclose(found[path + "lora_a"], of_down, rtol=1e-3, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(found[path + "lora_b"], scale * of_up, rtol=1e-3, atol=1e-4, err_msg=name)


def test_what_a_run_saves(trained, lora):
    saved = adapter.load(trained)
    assert saved.lora == dataclasses.replace(lora.lora, targets=["attention", "routed"])
    assert {array.dtype.name for array in saved.arrays.values()} == {"float32"}
    assert all(array.any() for array in saved.arrays.values())
    parts = {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in saved.arrays}
    layers = {f"layers.{i}.attention.{name}" for i in (0, 1) for name in ("qkv", "out")}
    assert parts == layers | {"layers.1.mlp.experts.gate_up", "layers.1.mlp.experts.down"}
    assert saved.arrays["layers.1.mlp.experts.gate_up.lora_a"].shape == (8, 4, 64)
    assert saved.arrays["layers.1.mlp.experts.gate_up.lora_b"].shape == (8, 2, 32, 4)
    assert saved.arrays["layers.0.attention.out.lora_a"].shape == (4, 2, 4, 16)
    with pytest.raises(UserError, match="this run is finished"):
        run(dataclasses.replace(lora, output=str(trained.parent)), progress=False)


def test_merged_and_beside_the_weights_it_computes_the_same(trained, lora, tmp_path, rng):
    prompt = rng.integers(3, 300, 20).tolist()
    plain = LLM.load(lora.checkpoint, **SIZE)
    before = plain.logits(prompt)
    adapter.attach(plain.model, adapter.load(trained), single(), jnp.float32)
    beside = LLM(plain.model, single(), None, plain.engine.options).logits(prompt)
    in_memory = LLM.load(lora.checkpoint, adapter=trained, **SIZE).logits(prompt)
    np.testing.assert_allclose(beside, in_memory, atol=2e-5)
    assert np.abs(beside - before).max() > 1e-2

    arguments = [f"--model={lora.checkpoint}", f"--adapter={trained}", f"--target={tmp_path / 'merged'}"]
    with pytest.raises(SystemExit) as end:
        main(["main.py", "merge", *arguments])
    assert end.value.code == 0
    merged = LLM.load(tmp_path / "merged", **SIZE)
    np.testing.assert_array_equal(merged.logits(prompt), in_memory)
    assert set(flat(nnx.state(merged.model))) == set(flat(nnx.state(checkpoint.restore(lora.checkpoint, single()))))
    with pytest.raises(UserError, match="this adapter is for another model"):  # it would be added twice
        LLM.load(tmp_path / "merged", adapter=trained, **SIZE)
    with pytest.raises(UserError, match="exists and is not empty"):
        adapter.merge_checkpoint(lora.checkpoint, str(trained), str(tmp_path / "merged"))


@pytest.fixture(scope="module")
def rounded(lora, config, tmp_path_factory):
    """Checkpoints with quantised weights, with int4 the embedding too, and others with what these stand for."""
    directory = tmp_path_factory.mktemp("rounded")
    for form in ("int8", "int4"):
        exact = flat(nnx.state(checkpoint.restore(lora.checkpoint, single())))
        own = dataclasses.replace(config, quantize=form, quantize_embedding=form == "int4")
        small, written_out = (Ernie(one, jnp.float32) for one in (own, config))
        values = dict(exact)
        for scale in [name for name in flat(nnx.state(small)) if name.endswith(".scale")]:
            weight = scale.removesuffix("scale") + "weight"
            outputs = {"qkv": 3, "out": 1}.get(weight.split(".")[-2], exact[weight].ndim - 1)
            quantized = quantize(np.asarray(exact[weight]), outputs, "int8" if weight == "embed.weight" else form)
            values |= {scale: quantized.scales, weight: quantized.values}
            exact[weight] = dequantize(quantized)
        for name, model, arrays in ((form, small, values), (f"{form}-exact", written_out, exact)):
            for path, leaf in nnx.to_flat_state(nnx.state(model)):
                leaf.set_value(jnp.asarray(arrays[".".join(map(str, path))]))
            checkpoint.save(directory / name, model, checkpoint.read_small_files(lora.checkpoint), "test")
    return directory


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_quantised_weights_keep_it_beside_them(form, trained, rounded, rng):
    prompt = rng.integers(3, 300, 20).tolist()
    small, written_out = (LLM.load(rounded / name, adapter=trained, **SIZE) for name in (form, f"{form}-exact"))
    assert small.model.layers[0].attention.qkv.kernel.weight.form == form
    np.testing.assert_allclose(small.logits(prompt), written_out.logits(prompt), atol=1e-4)
    with pytest.raises(UserError, match=f"rounded to {form}, and no adapter can be added"):
        adapter.merge(small.model, adapter.load(trained), single())


@pytest.mark.parametrize(("form", "backend"), [("int8", "blocks"), ("int8", "batched"), ("int4", "blocks")])
def test_quantised_weights_are_trained_with(rounded, lora, batch, form, backend):
    losses = []
    for name in (form, f"{form}-exact"):
        recipe = dataclasses.replace(lora, checkpoint=str(rounded / name), expert_backend=backend)
        trainer = Trainer(recipe, read_config(recipe), single())
        state = trainer.initial_state()
        for _ in range(3):
            state, metrics = trainer.step(state, batch)
            losses.append(float(metrics["train_loss"]))
    np.testing.assert_allclose(losses[:3], losses[3:], rtol=1e-4)
    with pytest.raises(UserError, match="rounded to int8; train adapters"):
        recipe = dataclasses.replace(lora, checkpoint=str(rounded / "int8"), lora_rank=0)
        Trainer(recipe, read_config(recipe), single())


def test_another_model_refuses_it(trained, config, tmp_path):
    other = Ernie(config, jnp.float32)
    initialize(other, single(), seed=6, scale=0.1)
    other.norm.weight.set_value(other.norm.weight[...] * 1.1)
    fields = json.dumps(dataclasses.asdict(config)).encode()
    checkpoint.save(tmp_path / "other", other, {"config.json": fields}, "test")
    with pytest.raises(UserError, match="this adapter is for another model"):
        LLM.load(tmp_path / "other", adapter=trained, **SIZE)
    with pytest.raises(UserError, match="not an adapter"):
        LLM.load(tmp_path / "other", adapter=tmp_path, **SIZE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_rank": -1}, "lora_rank is -1"),
        ({"lora_rank": 2, "lora_targets": ["router"]}, "lora_targets has router; known are attention"),
        ({"lora_rank": 2, "lora_targets": []}, "lora_targets is empty"),
    ],
)
def test_bad_fields(started, change, message):
    assert started.lora_targets == TARGETS
    with pytest.raises(UserError, match=message):
        dataclasses.replace(started, **change)
