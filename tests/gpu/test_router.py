"""Our router kernel against float64, on a GPU, as one kernel and as the two of GPUs without clusters."""

import functools

import jax
import numpy as np
import pytest

from ernie_jax.ops import ROUTER_BACKENDS, route
from tests.kernels import cases

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")


@pytest.fixture(params=["one kernel", "two kernels"], autouse=True)
def kernels(request, monkeypatch):
    clusters = request.param == "one kernel"
    monkeypatch.setitem(ROUTER_BACKENDS, "cuda", functools.partial(ROUTER_BACKENDS["cuda"], clusters=clusters))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 16, 17, 32, 33, 64, 65, 255, 256, 512])
def test_matches_float64(tokens, bias, rng):
    inputs = cases.draw_router(rng, tokens, bias=bias)
    cases.check_routing(*inputs, 6, *cases.run_route(inputs))


@pytest.mark.parametrize("tokens", [513, 2048, 8192])
def test_prompts_on_tensor_cores(tokens, rng):
    """XLA must not simplify away that a weight is the sum of three parts."""
    inputs = cases.draw_router(rng, tokens)
    cases.check_routing(*inputs, 6, *cases.run_route(inputs, backend="split"))


@pytest.mark.parametrize("tokens", [1, 2, 9, 33, 64, 100, 512])
def test_norm_and_routing_match_float64(tokens, rng):
    cases.check_norm_and_routing(rng, tokens)


@pytest.mark.parametrize(("width", "experts", "k"), [(128, 8, 2), (1024, 256, 16), (8192, 64, 8), (2688, 100, 7)])
@pytest.mark.parametrize("tokens", [1, 12, 20, 40, 100])
def test_other_sizes(tokens, width, experts, k, rng):
    inputs = cases.draw_router(rng, tokens, width, experts)
    cases.check_routing(*inputs, k, *cases.run_route(inputs, k))


@pytest.mark.parametrize("tokens", [1, 8, 100])
def test_of_equals_the_lower_id_is_chosen(tokens):
    cases.check_equals(tokens)


def test_small_probabilities_are_divided_by_norm_min(rng):
    cases.check_norm_min(rng)


def test_repeated_in_one_program(rng):
    """Results do not depend on what ran before, nor on what runs beside."""
    inputs = [cases.draw_router(rng, tokens) for tokens in (1, 4, 1, 30, 1, 256, 1, 8)]

    @jax.jit
    def run(inputs):
        return [route(*one, 6, cases.NORM_MIN, "cuda") for one in inputs]

    first = run(inputs)
    for _ in range(50):
        again = run(inputs)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))
    for one, out in zip(inputs, first, strict=True):
        cases.check_routing(*one, 6, *out)
