"""Attention of many tokens against float64: our Mosaic kernel in Pallas' interpreter."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from ernie_jax.ops import prefill_attention, prefill_kernel
from tests import emulator
from tests.kernels.cases import check_prefill


@pytest.fixture(autouse=True)
def aligned(monkeypatch):
    """Do the product that the interpreter does not know, and check the rows of tiles, whose alignment it ignores."""
    attend = prefill_kernel.attend_tiles

    def attend_tiles(q, pages, table, tiles, **options):
        first, _, _, _, start, end = np.asarray(tiles)[np.asarray(tiles)[:, 2] > 0].T
        assert all((rows % 8 == 0).all() for rows in (first, start, end)) and len(q) % 8 == 0
        assert (first + prefill_kernel.TILE <= len(q)).all() and (end <= prefill_kernel.TILE).all()
        written = [np.arange(*some) for some in zip(first + start, first + end, strict=True)]
        assert sorted(np.concatenate(written)) == list(range(len(q)))
        return attend(q, pages, table, tiles, **options)

    monkeypatch.setattr(prefill_kernel, "attend_tiles", attend_tiles)
    monkeypatch.setattr(
        prefill_kernel,
        "add_product",
        lambda out, weights, values: out + jnp.dot(weights, values[...], preferred_element_type=jnp.float32),
    )


# Page size, (cached before, new tokens) of each sequence, and padding tokens.
@pytest.mark.parametrize(
    ("page_size", "runs", "padding"),
    [
        (128, [(0, 1)], 6),
        (128, [(77, 150)], 130),
        (128, [(0, 129), (70, 1), (5, 2), (130, 128)], 0),
        (64, [(13, 9), (200, 140), (0, 70)], 37),
        (64, [(0, 0), (0, 0)], 9),
    ],
)
def test_attention(page_size, runs, padding, rng):
    run = functools.partial(prefill_attention.prefill, interpret=plgpu.InterpretGPUParams())
    check_prefill(rng, run, runs, padding, page_size, kv_heads=1, group=2)


@pytest.mark.skipif(emulator.problem() is not None, reason=str(emulator.problem()))
@pytest.mark.parametrize(
    ("kv_dtype", "spare", "runs"),
    [(jnp.int8, -1, [(77, 150)]), (jnp.int8, 9, [(13, 9), (100, 40)]), (jnp.float8_e4m3fn, 9, [(77, 150)])],
    ids=["all pages", "pages of rows", "fp8"],
)
def test_pages_in_8_bits(kv_dtype, spare, runs, rng):
    run = functools.partial(prefill_attention.prefill, interpret=plgpu.InterpretGPUParams())
    with emulator.emulated():
        check_prefill(rng, run, runs, 5, 64, kv_heads=2, group=1, kv_dtype=kv_dtype, spare=spare)
