"""Attention of packed rows and its gradient against float64: our Mosaic kernels in Pallas' interpreter."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from ernie_jax.errors import UserError
from ernie_jax.kernels import compiling_for
from ernie_jax.ops import packed, packed_attention, packed_kernel
from tests.kernels.cases import check_packed


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Run the kernels on the CPU, and do the product that the interpreter does not know."""

    def add_product(total, a, b):
        b = b[...]
        plgpu.commit_smem()  # the interpreter wants it before a copy overwrites what was read; a barrier does on GPUs
        return total + jnp.dot(a, b, preferred_element_type=jnp.float32)

    def add_two_products(totals, *pairs):
        return tuple(add_product(total, *pair) for total, pair in zip(totals, pairs, strict=True))

    monkeypatch.setattr(packed_kernel, "add_product", add_product)
    monkeypatch.setattr(packed_kernel, "add_two_products", add_two_products)
    interpret = plgpu.InterpretGPUParams()
    for name in ("attend", "pull_queries", "pull_keys"):
        monkeypatch.setattr(packed_kernel, name, functools.partial(getattr(packed_kernel, name), interpret=interpret))
    with compiling_for("9.0"):
        yield


@pytest.mark.parametrize("documents", [[[37, 113, 106]], [[128], [128]]], ids=lambda rows: "-".join(map(str, rows[0])))
def test_attention(documents, rng):
    check_packed(rng, functools.partial(packed_attention, backend="mosaic"), documents, kv_heads=1, group=2)


def test_blocks_of_another_size_and_races(rng, monkeypatch):
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    for name, block in (("attend", 64), ("pull_queries", 128), ("pull_keys", 128)):
        options = {"interpret": interpret, "block": block}
        monkeypatch.setattr(packed_kernel, name, functools.partial(getattr(packed_kernel, name), **options))
    check_packed(rng, functools.partial(packed_attention, backend="mosaic"), [[100, 156]], kv_heads=1, group=1)


@pytest.mark.parametrize(
    ("shape", "dtype", "problem"),
    [
        ((1, 128, 1, 1, 64), jnp.bfloat16, "takes heads of 128, not of 64"),
        ((1, 128, 1, 1, 128), jnp.float32, "takes bfloat16 heads, not float32"),
        ((1, 100, 1, 1, 128), jnp.bfloat16, "takes rows of a multiple of 128 tokens, not of 100"),
    ],
)
def test_what_it_does_not_take(shape, dtype, problem):
    q, k, segments = jnp.zeros(shape, dtype), jnp.zeros((*shape[:3], shape[4]), dtype), jnp.zeros(shape[:2], jnp.int32)
    with pytest.raises(UserError, match=f"attention backend mosaic {problem}; use attention backend xla"):
        packed_attention(q, k, k, segments, "mosaic")


def test_other_gpus_and_the_default():
    heads = 128, jnp.bfloat16, 8192
    assert packed.default_packed_backend("gpu", *heads) == "mosaic"
    assert packed.default_packed_backend("cpu", *heads) == "xla"
    with compiling_for("8.0"):
        assert packed.default_packed_backend("gpu", *heads) == "xla"
        assert packed.packed_problem("mosaic", *heads) == "is for GPUs of compute capability 9.0, not 8.0"


def test_bounds_of_documents():
    segments = jnp.asarray([[3, 3, 0, 0, 0, -1], [1, 1, 1, 1, 1, 1]])
    first, last = packed._bounds(segments)
    np.testing.assert_array_equal(first, [[0, 0, 2, 2, 2, 5], [0] * 6])
    np.testing.assert_array_equal(last, [[1, 1, 4, 4, 4, 5], [5] * 6])


def test_splash_matches_float64(rng):
    """JAX's TPU kernels, interpreted."""
    check_packed(rng, functools.partial(packed._splash, interpret=True), [[37, 113, 106]], kv_heads=1, group=2)


def test_splash_refuses_what_the_kernel_does_not_take():
    assert packed.default_packed_backend("tpu", 128, jnp.float32, 256) == "splash"
    assert packed.default_packed_backend("tpu", 64, jnp.float32, 256) == "xla"
    q = jnp.zeros((1, 100, 1, 1, 128))
    with pytest.raises(UserError, match="attention backend splash takes rows of a multiple of 128 tokens, not of 100"):
        packed_attention(q, q[:, :, 0], q[:, :, 0], jnp.zeros((1, 100), jnp.int32), "splash")
