"""Our kernels for few tokens against float64, on a GPU."""

import jax
import pytest

from ernie_jax.config import QUANTIZED_FORMS
from tests.kernels import cases

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 16])
@pytest.mark.parametrize(("inner", "outer"), [(2560, 3584), (2560, 2560), (12288, 2560), (256, 8), (2560, 20480)])
def test_linear(tokens, inner, outer, rng):
    cases.check_linear(rng, tokens, inner, outer)


@pytest.mark.parametrize("skew", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 8, 16, 17, 33, 64, 65, 130, 256, 300])
def test_experts(tokens, skew, rng):
    cases.check_experts(rng, tokens, 6, 64, 512, 512, skew)


@pytest.mark.parametrize("tokens", [1, 8, 64, 256])
def test_experts_at_full_size(tokens, rng):
    cases.check_experts(rng, tokens, 6, 16, 1536, 2560)


@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_shared_experts_along(tokens, rng):
    cases.check_shared_experts(rng, tokens, 6, 16, 512, 512)


@pytest.mark.parametrize("tokens", [1, 9, 100])
def test_shards_and_padding(tokens, rng):
    cases.check_shards(rng, tokens, 6, 32, 256, 512)


@pytest.mark.parametrize("tokens", [1, 7, 16])
@pytest.mark.parametrize(("inner", "outer"), [(2560, 3584), (12288, 2560), (256, 8), (1280, 20480)])
@pytest.mark.parametrize("form", QUANTIZED_FORMS)
def test_quantized_linear(form, inner, outer, tokens, rng):
    cases.check_linear(rng, tokens, inner, outer, form)


@pytest.mark.parametrize(("inner", "width"), [(512, 1024), (1536, 2560)])
@pytest.mark.parametrize("form", QUANTIZED_FORMS)
def test_quantized_experts_of_a_token(form, inner, width, rng):
    cases.check_experts(rng, 1, 6, 8, inner, width, form=form)
    cases.check_shared_experts(rng, 1, 6, 8, inner, width, form)
