"""What training computes by our kernels, with its gradients, against float64 on a Hopper GPU."""

import functools

import jax
import pytest

from ernie_jax.kernels import capability
from ernie_jax.ops import packed_attention
from tests.kernels.cases import check_packed, check_trained_experts

pytestmark = [
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
    pytest.mark.skipif(capability() != "9.0", reason="needs a Hopper GPU"),
]


@pytest.mark.parametrize(
    "documents",
    [
        [[2048]],
        [[37, 113, 106, 768]],
        [[1, 127, 128, 640], [200, 5, 690, 1]],
        [[13] * 128 + [384]],
    ],
    ids=lambda rows: f"{len(rows)}x{sum(rows[0])}-{len(rows[0])}",
)
@pytest.mark.parametrize(("kv_heads", "group"), [(4, 5), (2, 1)])
def test_attention(documents, kv_heads, group, rng):
    attend = jax.jit(functools.partial(packed_attention, backend="mosaic"))
    check_packed(rng, attend, documents, kv_heads, group)


@pytest.mark.parametrize(
    ("learns", "some", "rank"),
    [(True, None, 0), (False, None, 0), (True, (3, 4), 0), (False, None, 32), (False, (3, 4), 100)],
)
@pytest.mark.parametrize(("tokens", "k", "experts"), [(1000, 3, 8), (40, 2, 16)])
def test_experts(tokens, k, experts, learns, some, rank, rng):
    check_trained_experts(rng, tokens, k, experts, 512, 768, learns, some, rank)
