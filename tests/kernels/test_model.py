"""Decode steps of a whole small model through our GPU kernels, emulated, beside XLA's, both against float32."""

import dataclasses
import functools

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from ernie_jax.config import ModelConfig
from ernie_jax.ops import mosaic_kernel
from ernie_jax.sharding import single
from tests import emulator
from tests.kernels.whole_model import Case, check, compare, models

pytestmark = pytest.mark.skipif(emulator.problem() is not None, reason=str(emulator.problem()))

CONFIG = ModelConfig(
    "ernie4_5_moe",
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=10,
    num_key_value_heads=2,
    head_dim=128,
    max_position_embeddings=2048,
    moe_num_experts=64,
    moe_k=6,
    moe_intermediate_size=256,
    moe_num_shared_experts=2,
)
OURS = {"attention_backend": "cuda", "router_backend": "cuda"}
CASES = [
    (Case(((200, 1),)), {"expert_backend": "cuda", "linear_backend": "cuda", "halves_backend": "cuda"}),
    (Case(((0, 1),)), {"expert_backend": "cuda", "linear_backend": "cuda", "halves_backend": "none"}),
    (Case(((30, 1), (270, 1), (5, 1))), {"expert_backend": "mosaic", "halves_backend": "cuda"}),
    (Case(tuple((19 * i, 1) for i in range(20))), {"expert_backend": "mosaic"}),
    # As prompts go through experts: a router that does not normalise for itself.
    (Case(((30, 1), (270, 1))), {"expert_backend": "mosaic", "halves_backend": "cuda", "router_backend": "split"}),
    (Case(((30, 1), (270, 1), (5, 1))), {"expert_backend": "cuda", "halves_backend": "cuda", "kv_dtype": jnp.int8}),
]


# Pallas' interpreter takes its time for each expert that is chosen.
INTERPRETED = dataclasses.replace(CONFIG, moe_k=2)
# Every expert is chosen, so that no near-tie of the router falls either way.
QUANTIZED = dataclasses.replace(CONFIG, hidden_size=512, moe_intermediate_size=512, moe_num_experts=6)


@functools.cache
def pair(config):
    return models(config, single())


@pytest.mark.parametrize(("case", "backends"), CASES, ids=lambda x: getattr(x, "name", ""))
def test_ours_is_as_near_to_float32_as_xlas(case, backends, rng, monkeypatch):
    config = INTERPRETED if backends["expert_backend"] == "mosaic" else CONFIG
    monkeypatch.setattr(mosaic_kernel, "_SMS", 4)
    run = functools.partial(mosaic_kernel.grouped_product, interpret=plgpu.InterpretGPUParams())
    monkeypatch.setattr(mosaic_kernel, "grouped_product", run)
    with emulator.emulated():
        print(check(compare(config, case, rng, pair(config), **OURS | backends)))


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_a_token_of_a_quantised_model(form, rng):
    """All weights by our kernels, most of them in halves of layers."""
    case, backends = CASES[0]
    with emulator.emulated():
        print(check(compare(dataclasses.replace(QUANTIZED, quantize=form), case, rng, **OURS, **backends)))
