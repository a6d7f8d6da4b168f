"""Our router kernel against float64, in the emulator, as one kernel and as the two of GPUs without clusters."""

import functools

import pytest

from ernie_jax.ops import ROUTER_BACKENDS
from tests.emulator import emulated
from tests.kernels import cases

pytestmark = pytest.mark.usefixtures("emulator")


@pytest.fixture(params=["one kernel", "two kernels"], autouse=True)
def kernels(request, monkeypatch):
    clusters = request.param == "one kernel"
    monkeypatch.setitem(ROUTER_BACKENDS, "cuda", functools.partial(ROUTER_BACKENDS["cuda"], clusters=clusters))


@pytest.mark.parametrize("tokens", [1, 8, 9, 17, 33, 65])
def test_matches_float64(tokens, rng):
    inputs = cases.draw_router(rng, tokens, 512)
    cases.check_routing(*inputs, 6, *cases.run_route(inputs))


@pytest.mark.parametrize(("tokens", "width", "experts"), [(1, 512, 64), (12, 2688, 100), (65, 512, 64)])
def test_norm_and_routing_match_float64(tokens, width, experts, rng):
    cases.check_norm_and_routing(rng, tokens, width, experts)


@pytest.mark.parametrize(("width", "experts", "k"), [(128, 8, 2), (256, 256, 16), (4096, 64, 8), (2688, 100, 7)])
@pytest.mark.parametrize("tokens", [1, 12])
def test_other_sizes(tokens, width, experts, k, rng):
    inputs = cases.draw_router(rng, tokens, width, experts)
    with emulated(unwritten=True):  # with fewer than 64 experts it computes sums that it does not use
        cases.check_routing(*inputs, k, *cases.run_route(inputs, k))


@pytest.mark.parametrize("tokens", [1, 20])
def test_of_equals_the_lower_id_is_chosen(tokens):
    cases.check_equals(tokens, 256)


def test_small_probabilities_are_divided_by_norm_min(rng):
    cases.check_norm_min(rng, 256)
