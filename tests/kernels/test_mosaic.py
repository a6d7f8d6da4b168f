"""Experts of several tokens: our Mosaic kernel in Pallas' interpreter, and the CUDA kernels around it emulated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from ernie_jax.errors import UserError
from ernie_jax.kernels import compiling_for
from ernie_jax.ops import (
    Adapted,
    Quantized,
    grouped_mlp,
    linear,
    mlp,
    mosaic,
    mosaic_gradient,
    mosaic_kernel,
    quantized_kernel,
    takes_shared,
)
from ernie_jax.ops.mosaic import TILES, QuantizedTiles, by_mosaic
from ernie_jax.ops.mosaic_kernel import Tiling, grouped_product
from tests import emulator
from tests.kernels.cases import check_linear, check_trained_experts, rounded

pytestmark = pytest.mark.skipif(emulator.problem() is not None, reason=str(emulator.problem()))

BOUND = 6e-3  # bfloat16 in and out, hidden values rounded up to four times
EXPERTS, K, INNER, WIDTH = 6, 3, 256, 256


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Run Mosaic kernels on the CPU, on fewer multiprocessors than there are tiles.

    Copies that share a clock hide races from each other, so that each has one of its own.
    """
    monkeypatch.setattr(mosaic_kernel, "_SMS", 4)
    parameters = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=256)
    run = functools.partial(grouped_product, interpret=parameters)
    monkeypatch.setattr(mosaic_kernel, "grouped_product", run)
    run = functools.partial(mosaic_gradient.grouped_outer_product, interpret=parameters)
    monkeypatch.setattr(mosaic_gradient, "grouped_outer_product", run)
    monkeypatch.setattr(quantized_kernel, "_SMS", 4)
    run = functools.partial(quantized_kernel.grouped_product, interpret=parameters)
    monkeypatch.setattr(quantized_kernel, "grouped_product", run)
    monkeypatch.setattr(quantized_kernel, "add_products", add_products)
    monkeypatch.setattr(quantized_kernel, "nibbles", nibbles)
    monkeypatch.setattr(quantized_kernel, "whole_numbers", lambda stored: stored.astype(jnp.bfloat16))


def add_products(totals, weights, rows):
    """Do what tensor cores do with operands from registers, of which the interpreter knows nothing."""
    for parts, piece in zip(weights(), [piece[...].T for piece in rows], strict=True):
        products = (jnp.dot(part, piece, preferred_element_type=jnp.float32) for part in parts)
        totals = [total + product for total, product in zip(totals, products, strict=True)]
    plgpu.commit_smem()  # the interpreter wants it before a copy overwrites what was read; a barrier does on GPUs
    return tuple(totals)


def nibbles(stored):
    return tuple(part.astype(jnp.bfloat16) - jnp.bfloat16(8) for part in (stored & 15, stored >> 4))


def distance(out, expected):
    return np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)


def swiglu(x, gate_up):
    gate, up = np.asarray(gate_up, np.float64) @ x
    return gate / (1 + np.exp(-gate)) * up


def reference(x, chosen, weights, gate_up, down, first=0, shared=None):
    x, weights, down = (np.asarray(a, np.float64) for a in (x, weights, down))
    out = np.zeros_like(x)
    for t in range(len(x)):
        for slot, e in enumerate(np.asarray(chosen[t]) - first):
            if 0 <= e < len(gate_up):
                out[t] += weights[t, slot] * (down[e] @ swiglu(x[t], gate_up[e]))
        if shared is not None:
            out[t] += np.asarray(shared[1], np.float64) @ swiglu(x[t], shared[0])
    return out


def draw(rng, tokens, skewed=False):
    def normal(*shape, scale=1.0):
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.bfloat16)

    chosen = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :K].astype(np.int32)
    if skewed:
        chosen[:] = [4, 1, 1000]
    weights = jnp.asarray(rng.dirichlet(np.ones(K), size=tokens), jnp.bfloat16)
    gate_up = normal(EXPERTS, 2, INNER, WIDTH, scale=WIDTH**-0.5)
    down = normal(EXPERTS, WIDTH, INNER, scale=INNER**-0.5)
    shared = (
        normal(2, 2 * INNER, WIDTH, scale=WIDTH**-0.5),
        normal(WIDTH, 2 * INNER, scale=INNER**-0.5),
    )
    return normal(tokens, WIDTH), jnp.asarray(chosen), weights, gate_up, down, shared


@pytest.mark.parametrize(("tokens", "skewed", "more"), [(2, False, 1), (33, False, 0), (90, True, 2)])
def test_experts(tokens, skewed, more, rng):
    *arguments, _ = draw(rng, tokens, skewed)
    addends = [jnp.asarray(rng.normal(size=(tokens, WIDTH)), jnp.bfloat16) for _ in range(more)]
    with emulator.emulated():
        out = grouped_mlp(*arguments, "mosaic", addends=addends)
    expected = reference(*arguments) + sum(np.asarray(addend, np.float64) for addend in addends)
    assert distance(out, expected) < BOUND


@pytest.mark.parametrize("tokens", [3, 70])
def test_mlp_of_all_tokens(tokens, rng):
    x, *_, shared = draw(rng, tokens)
    with emulator.emulated():
        out = mlp(x, *shared)
    nobody = np.zeros((tokens, 0))
    expected = reference(x, nobody, nobody, *np.zeros((2, 1)), shared=shared)
    assert out.shape == x.shape and distance(out, expected) < BOUND


@pytest.mark.parametrize(
    ("learns", "some", "rank"),
    [(True, None, 0), (False, (1, 2), 8)],
    ids=["weights", "adapters, a shard"],
)
def test_training(learns, some, rank, rng):
    with compiling_for("9.0"):
        check_trained_experts(rng, *((200, 1, 2) if learns else (40, 2, 4)), WIDTH, INNER, learns, some, rank)


def test_gradient_of_an_expert_without_rows(rng):
    left, right = (jnp.asarray(rng.normal(size=(192, size)), jnp.bfloat16) for size in (128, 256))
    groups = jnp.asarray([[0, 2], [2, 0], [2, 1]], jnp.int32)
    out = mosaic_gradient.grouped_outer_product(left, right, groups, steps=2)
    left, right = (np.asarray(x, np.float64) for x in (left, right))
    expected = np.stack([left[rows].T @ right[rows] for rows in (slice(128), slice(0), slice(128, 192))])
    assert distance(out, expected) < BOUND and not np.asarray(out[1]).any()


def test_padding_goes_to_no_expert(rng):
    *arguments, _ = draw(rng, 20)
    with emulator.emulated():
        out = np.asarray(grouped_mlp(*arguments, "mosaic", live=jnp.int32(7)), np.float64)
    assert distance(out[:7], reference(*arguments)[:7]) < BOUND
    assert not out[7:].any()


def test_experts_of_two_shards_add_up(rng):
    x, chosen, weights, gate_up, down, _ = draw(rng, 9)
    with emulator.emulated():
        parts = [
            grouped_mlp(x, chosen, weights, gate_up[a : a + 3], down[a : a + 3], "mosaic", first_expert=a)
            for a in (0, 3)
        ]
    total = sum(np.asarray(part, np.float64) for part in parts)
    assert distance(total, reference(x, chosen, weights, gate_up, down)) < BOUND


@pytest.mark.parametrize(
    ("tokens", "k", "shared", "width", "live", "skewed"),
    [
        (1, 2, 1, 256, 1, False),
        (3, 2, 0, 10496, 3, False),  # a row that a CUDA block holds only part of
        (70, 6, 2, 256, 69, True),  # blocks of shared experts and of chosen ones that end within the padding
        (20, 3, 2, 256, 0, False),
        (514, 6, 1, 256, 511, False),  # several tokens to a CUDA block; two chunks, one of them counted
        (1030, 6, 0, 256, 1030, True),
        (515, 1, 1, 2816, 514, False),
    ],
)
def test_rows_come_sorted_and_are_summed_in_order(tokens, k, shared, width, live, skewed, rng, monkeypatch):
    """Without the product between, so that every bit is known; some pairs are another shard's."""
    first, products = 5, []

    def product(rows, weight, blocks, count, tiling, beside):
        products.append([np.asarray(a) for a in (rows, blocks, count)])
        return rows

    monkeypatch.setattr(quantized_kernel, "grouped_product", product)
    x = jnp.asarray(rng.normal(size=(tokens, width)), jnp.bfloat16)
    chosen = rng.integers(first - 1, first + EXPERTS + 1, size=(tokens, k))  # may name one twice
    if skewed:
        chosen[:, 1:] = first + 4
    chosen = jnp.asarray(chosen, jnp.int32)
    weights = jnp.asarray(rng.random((tokens, k)), jnp.bfloat16)
    sizes = (EXPERTS, 2, INNER, width), (EXPERTS, width, INNER), (2, shared * INNER, width), (width, shared * INNER)
    gate_up, down, *along = (Quantized(np.broadcast_to(np.int8(0), size), np.zeros(size[:-1])) for size in sizes)
    tiles = (QuantizedTiles(16, 128, 4, 12),) * 2
    along = along if shared and tokens <= 512 else None
    shared = shared if along else 0
    addends = [jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16) for _ in range(k % 3)]
    with emulator.emulated():
        out = by_mosaic(x, chosen, weights, gate_up, down, first, along, jnp.int32(live), addends, tiles)

    (rows, blocks, count), _ = products
    values, sums = np.asarray(x, np.float32), np.zeros((tokens, width), np.float32)
    ids = np.array(chosen) - first
    ids[(ids < 0) | (ids >= EXPERTS)] = -1
    ids = np.concatenate([ids, np.broadcast_to(EXPERTS + np.arange(shared), (tokens, shared))], axis=1)
    ids[live:] = -1
    expected, row = [], 0
    for e in range(EXPERTS + shared):
        of = np.nonzero(ids == e)[0]
        np.testing.assert_array_equal(np.asarray(rows[row : row + len(of)], np.float32), values[of])
        expected += [(e, row + at, min(16, len(of) - at)) for at in range(0, len(of), 16)]
        row += -(-len(of) // 8) * 8
    assert count == len(expected)
    np.testing.assert_array_equal(blocks[: len(expected)], np.reshape(expected, (-1, 3)))
    for slot in range(k + shared):
        scale = np.asarray(weights[:, slot : slot + 1], np.float32) if slot < k else np.float32(1)
        sums += np.where(ids[:, slot, None] >= 0, scale * values, np.float32(0))
    for addend in addends:
        sums += np.asarray(addend, np.float32)
    np.testing.assert_array_equal(np.asarray(out), sums.astype(jnp.bfloat16))


@pytest.mark.parametrize("least", TILES)
def test_a_product_writes_its_own_rows_only(least, rng):
    """Blocks of any length, the last of them not live."""
    tiling = Tiling(*TILES[least][1])._replace(steps=2)
    *_, down, _ = draw(rng, 1)
    most = tiling.block
    lengths = [5, most, 17, 1, 8, 30, 9]
    starts = np.cumsum([0, *(-(-length // 8) * 8 for length in lengths)])
    blocks = np.array([*zip([0, 2, 3, 1, 5, 1, 4], starts, lengths, strict=False)], np.int32)
    rows = jnp.asarray(rng.normal(size=(starts[-1] + most, INNER)), jnp.bfloat16)
    live = len(blocks) - 1
    arguments = rows, down[:, None], jnp.asarray(blocks), jnp.asarray([live], jnp.int32), tiling
    out = np.asarray(mosaic_kernel.grouped_product(*arguments), np.float64)
    written = np.zeros(len(rows), bool)
    for expert, start, length in blocks[:live]:
        here = slice(start, start + length)
        expected = np.asarray(rows[here], np.float64) @ np.asarray(down[expert], np.float64).T
        assert distance(out[here], expected) < BOUND
        written[start : start + -(-length // 8) * 8] = True
    assert np.isnan(out[~written]).all()  # the interpreter's mark of what nobody wrote


def test_sizes_it_does_not_take(rng):
    x, chosen, weights, gate_up, down, _ = draw(rng, 2)
    with emulator.emulated(), pytest.raises(UserError, match="takes multiples of 256, not an inner width of 128"):
        grouped_mlp(x, chosen, weights, gate_up[:, :, :128], down[:, :, :128], "mosaic")


def test_adapters_that_it_does_not_take(rng):
    *inputs, gate_up, down, _ = draw(rng, 2)
    low = jnp.zeros((EXPERTS, 8, WIDTH), jnp.bfloat16), jnp.zeros((EXPERTS, 2, INNER, 8), jnp.bfloat16)
    for weight, addends in ((gate_up, inputs[:1]), (rounded(gate_up, "int8")[0], [])):
        with pytest.raises(UserError, match="takes adapters where it trains only; use expert backend batched"):
            grouped_mlp(*inputs, Adapted(weight, *low), down, "mosaic", addends=addends)


def test_shared_experts_that_it_does_not_take(rng):
    *arguments, shared = draw(rng, 2)
    with emulator.emulated(), pytest.raises(UserError, match="takes quantised shared experts along, of up to 512"):
        grouped_mlp(*arguments, "mosaic", shared=shared)


@pytest.mark.parametrize(
    ("form", "tokens", "along"), [("int8", 9, True), ("fp8", 16, True), ("int8", 40, False), ("int4", 70, True)]
)
def test_quantized_experts(form, tokens, along, rng):
    x, chosen, weights, *exact = draw(rng, tokens)
    (gate_up, down, *shared), wide = zip(*(rounded(w, form) for w in (*exact[:2], *exact[2])), strict=True)
    with emulator.emulated():
        out = grouped_mlp(x, chosen, weights, gate_up, down, "mosaic", shared=shared if along else None)
    expected = reference(x, chosen, weights, *wide[:2], shared=wide[2:] if along else None)
    assert distance(out, expected) < BOUND


@pytest.mark.parametrize(("form", "tokens"), [("int8", 20), ("int4", 70), (None, 70), (None, 150)])
def test_product(form, tokens, rng):
    with emulator.emulated():
        check_linear(rng, tokens, 1024, 256, form, "mosaic")


def test_fp8_tokens(rng, monkeypatch):
    """Of many tokens both operands are fp8, which costs precision: that of random numbers in three bits of fraction."""
    for least in ("_FP8_EXPERTS", "_FP8_PRODUCTS"):
        monkeypatch.setattr(mosaic, least, 17)
    x, chosen, weights, *exact = draw(rng, 40)
    (gate_up, down, *shared), wide = zip(*(rounded(w, "fp8") for w in (*exact[:2], *exact[2])), strict=True)
    with emulator.emulated():
        assert not takes_shared("mosaic", 40, INNER, 2 * INNER, gate_up.dtype)
        out = np.asarray(grouped_mlp(x, chosen, weights, gate_up, down, "mosaic", live=jnp.int32(33)), np.float64)
    assert 0.01 < distance(out[:33], reference(x, chosen, weights, *wide[:2])[:33]) < 0.06
    nobody = np.full_like(chosen, -1)
    with emulator.emulated():
        out = mlp(x, *shared)
    assert 0.01 < distance(out, reference(x, nobody, weights, *wide[:2], shared=wide[2:])) < 0.06
    with emulator.emulated():
        out = linear("td,od->to", x, jax.tree.map(lambda a: a[0, 0], gate_up), backend="mosaic")
    assert 0.01 < distance(out, np.asarray(x, np.float64) @ wide[0][0, 0].T) < 0.04
