"""Experts and attention of many tokens against float64, on a Hopper GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax.config import QUANTIZED_FORMS
from ernie_jax.kernels import capability
from ernie_jax.ops import grouped_mlp, mlp, quantized_specs, takes_shared
from ernie_jax.ops.mosaic import multiplies_fp8
from ernie_jax.ops.prefill_attention import prefill
from tests.kernels.cases import (
    BOUND,
    check_experts,
    check_linear,
    check_prefill,
    check_shared_experts,
    distance,
    experts_reference,
    normal,
    rounded,
)

pytestmark = [
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
    pytest.mark.skipif(capability() != "9.0", reason="needs a Hopper GPU"),
]


FP8_BOUND = 0.06  # tokens and hidden values rounded to fp8


@pytest.mark.parametrize("routing", ["even", "one expert", "padded"])
@pytest.mark.parametrize("tokens", [1, 130, 1000])
def test_experts(tokens, routing, rng):
    count, k, inner, width = 8, 3, 512, 768
    x, gate_up, down = (
        jnp.asarray(rng.normal(size=shape) * scale, jnp.bfloat16)
        for shape, scale in (
            ((tokens, width), 1),
            ((count, 2, inner, width), width**-0.5),
            ((count, width, inner), inner**-0.5),
        )
    )
    chosen = np.argsort(rng.random((tokens, count)), axis=1)[:, :k].astype(np.int32)
    if routing == "one expert":
        chosen[:, 0], chosen[:, 1:] = 5, rng.choice([-1, count])
    if routing == "padded":
        chosen[tokens // 2 + 1 :] = 1000
    weights = jnp.asarray(rng.dirichlet(np.ones(k), size=tokens), jnp.bfloat16)
    run = jax.jit(functools.partial(grouped_mlp, backend="mosaic"))
    expected = experts_reference(x, chosen, weights, gate_up, down)
    assert distance(run(x, chosen, weights, gate_up, down), expected) < BOUND
    shards = [run(x, chosen, weights, gate_up[a : a + 4], down[a : a + 4], first_expert=a) for a in (0, 4)]
    assert distance(sum(np.asarray(shard, np.float64) for shard in shards), expected) < BOUND


@pytest.mark.parametrize("tokens", [2, 60, 200, 700, 3000])
@pytest.mark.parametrize("form", QUANTIZED_FORMS)
def test_quantized_experts(form, tokens, rng):
    dtype = quantized_specs(form, (256,), 0).dtype
    bound = FP8_BOUND if multiplies_fp8(tokens, dtype, experts=True) else BOUND
    check_experts(rng, tokens, 3, 8, 512, 768, form=form, backend="mosaic", bound=bound)
    if takes_shared("mosaic", tokens, 512, 512, dtype):
        check_shared_experts(rng, tokens, 3, 8, 768, 512, form, "mosaic")


@pytest.mark.parametrize(("form", "tokens"), [(None, 2), (None, 60), (None, 200), ("fp8", 70), ("fp8", 200)])
def test_mlp_of_all_tokens(form, tokens, rng):
    x = normal(rng, tokens, 2560)
    (gate_up, down), wide = zip(
        *(rounded(normal(rng, *shape, scale=shape[-1] ** -0.5), form) for shape in ((2, 3072, 2560), (2560, 3072))),
        strict=True,
    )
    everyone = jnp.zeros((tokens, 1), jnp.int32), np.ones((tokens, 1))
    expected = experts_reference(x, *everyone, wide[0][None], wide[1][None])
    assert distance(jax.jit(mlp)(x, gate_up, down), expected) < (FP8_BOUND if form else BOUND)


@pytest.mark.parametrize(("inner", "outer"), [(2560, 3584), (2560, 24576), (12288, 2560), (256, 128)])
@pytest.mark.parametrize("tokens", [17, 64, 300])
@pytest.mark.parametrize("form", [None, *QUANTIZED_FORMS])
def test_product(form, tokens, inner, outer, rng):
    check_linear(rng, tokens, inner, outer, form, "mosaic")


@pytest.mark.parametrize("tokens", [520, 2048])
def test_fp8_product(tokens, rng):
    check_linear(rng, tokens, 2560, 3584, "fp8", "mosaic", FP8_BOUND)


# (cached before, new tokens) of each sequence, and padding tokens.
STEPS = [
    ([(0, 1)], 7),
    ([(0, 300)], 0),
    ([(77, 500)], 200),
    ([(0, 129), (640, 1), (1000, 128), (5, 2)], 0),
    ([(13, 9), (2000, 400), (0, 700)], 300),
]


@pytest.mark.parametrize("page_size", [64, 128])
@pytest.mark.parametrize(("runs", "padding"), STEPS)
def test_attention(runs, padding, page_size, rng):
    check_prefill(rng, jax.jit(prefill), runs, padding, page_size, kv_heads=2, group=5)
