"""Our kernels for few tokens against float64, in the emulator."""

import jax.numpy as jnp
import pytest

from ernie_jax.config import QUANTIZED_FORMS
from ernie_jax.errors import UserError
from ernie_jax.ops import grouped_mlp, takes_shared
from tests.kernels import cases

pytestmark = pytest.mark.usefixtures("emulator")


@pytest.mark.parametrize("tokens", [1, 8, 9, 16])
def test_linear(tokens, rng):
    cases.check_linear(rng, tokens, 768, 24)


def test_wide_linear(rng):
    cases.check_linear(rng, 3, 256, 16384)


@pytest.mark.parametrize("skew", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 65])
def test_experts(tokens, skew, rng):
    cases.check_experts(rng, tokens, 3, 8, 256, 256, skew)


def test_wider_experts(rng):
    cases.check_experts(rng, 5, 6, 33, 512, 768)


@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_shared_experts_along(tokens, rng):
    cases.check_shared_experts(rng, tokens, 3, 4, 256, 256)


@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_shards_and_padding(tokens, rng):
    cases.check_shards(rng, tokens, 6, 16, 256, 256)


@pytest.mark.parametrize(("tokens", "outer"), [(1, 24), (16, 24), (3, 16384)])
@pytest.mark.parametrize("form", QUANTIZED_FORMS)
def test_quantized_linear(form, tokens, outer, rng):
    cases.check_linear(rng, tokens, 1280 if outer == 24 else 256, outer, form)


@pytest.mark.parametrize("form", QUANTIZED_FORMS)
def test_quantized_experts_of_a_token(form, rng):
    cases.check_experts(rng, 1, 3, 5, 512, 1024, form=form)
    cases.check_shared_experts(rng, 1, 2, 3, 1024, 512, form)


def test_a_width_of_shared_experts_that_is_no_multiple_of_256_is_refused():
    def zeros(*shape):
        return jnp.zeros(shape, jnp.bfloat16)

    arguments = zeros(1, 256), jnp.zeros((1, 2), jnp.int32), zeros(1, 2), zeros(4, 2, 256, 256), zeros(4, 256, 256)
    with pytest.raises(UserError, match=r"takes multiples of 256, not 384 \(shared width\)"):
        grouped_mlp(*arguments, "cuda", shared=(zeros(2, 384, 256), zeros(256, 384)))
    assert takes_shared("cuda", 1, 256, 512) and not takes_shared("cuda", 1, 256, 384)
