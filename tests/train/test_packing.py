"""Packing: every piece in one row, no row too full, the same every time, and few places empty."""

import numpy as np
import pytest

from ernie_jax.train.packing import best_fit, plan_stream, plan_whole


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("capacity", [64, 1024])
def test_rows_are_never_too_full(sides, capacity, rng):
    sizes = np.minimum(rng.geometric(0.02, (9000, sides)), capacity)  # more than two windows
    rows = best_fit(sizes, capacity)
    counts = np.bincount(rows)
    assert (counts > 0).all()
    for side in range(sides):
        assert np.bincount(rows, weights=sizes[:, side]).max() <= capacity
    np.testing.assert_array_equal(rows, best_fit(sizes, capacity))


def test_rows_are_full(rng):
    sizes = np.minimum(rng.lognormal(6, 0.9, (5000, 1)).astype(int) + 5, 8192)
    rows = best_fit(sizes, 8192)
    assert sizes.sum() / ((rows.max() + 1) * 8192) > 0.99


def test_best_fit_fills_the_fullest_row_there_is():
    assert best_fit(np.array([[6], [5], [4], [5], [3], [7]]), 10).tolist() == [1, 2, 1, 2, 0, 0]


@pytest.mark.parametrize("plan", [plan_stream, plan_whole])
def test_every_token_is_placed_once(plan, rng):
    lengths = rng.integers(1, 90, 200)
    order = rng.permutation(200)
    found = plan(order, lengths if plan is plan_stream else lengths[:, None], 40).shuffled(rng)
    rows = np.add.reduceat(found.sizes[:, 0], found.begins[:-1])
    assert rows.max() <= 40 and len(rows) == len(found)
    places = [
        (document, offset + i)
        for document, offset, (size,) in zip(found.documents, found.offsets, found.sizes.tolist(), strict=True)
        for i in range(size)
    ]
    assert sorted(places) == [(d, i) for d in range(200) for i in range(lengths[d])]
    if plan is plan_stream:
        assert sorted(rows)[1:] == [40] * (len(rows) - 1)
