"""The "mosaic" backends, for Hopper GPUs: the grouped expert MLP of a few to many tokens, pairs sorted by expert, and
an MLP and products of some tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ernie_jax import kernels
from ernie_jax.errors import UserError
from ernie_jax.ops.quantized import Quantized, form_of
from ernie_jax.ops.stream import operand_problem

_ALIGNMENT = 8  # rows, at a multiple of which an expert's rows begin, for the kernels
_DEPTH = 128  # bytes of each row of weights that are loaded together
_SHARED_MEMORY = 224 << 10  # of a CUDA block, without its barriers
MOST = 512  # tokens of a product, or along with the chosen experts through the shared ones
# From so many tokens on they become fp8 as well, by a factor each, to meet fp8 weights: of experts where to make those
# bfloat16 takes longer than to read them, of other products where the operations limit.
_FP8_EXPERTS, _FP8_PRODUCTS = 65, MOST + 1


class Tiles(NamedTuple):
    """How our kernel cuts a product up; see `mosaic_kernel.Tiling`."""

    rows: int
    columns: int
    split: str
    steps: int
    band: int

    @property
    def block(self) -> int:
        return self.rows * (2 if self.split == "rows" else 1)


# From so many pairs of a token and an expert on: gate and up, down. Both must agree in the rows of a block. Of a few
# pairs the weights are what takes time: small tiles, and no multiprocessor that has one more of them than others.
# Measured by benchmarks/prefill_ops.py, those of few on an H100, those of many on an H200.
TILES = {
    0: (Tiles(64, 128, "tiles", 4, 12), Tiles(64, 128, "tiles", 4, 10)),
    4096: (Tiles(64, 256, "rows", 4, 12), Tiles(64, 256, "rows", 4, 10)),
}


# Of a product with bfloat16 weights, of up to 128 tokens and of more. A tile is all that a multiprocessor has, so loads
# in flight fill its shared memory.
_PRODUCT_TILES = Tiles(64, 64, "tiles", 12, 12), Tiles(64, 128, "tiles", 7, 12)


class QuantizedTiles(NamedTuple):
    """How our kernel cuts up a product of quantised weights; see `quantized_kernel.Tiling`."""

    block: int
    depth: int
    steps: int
    band: int
    halves: int = 2
    splits: int = 1


# From so many pairs on, for one and for two weights in a byte. Tokens are the short side of a tile here, as many as
# most experts have; the loads in flight are what shared memory holds. Chosen by sweeps of 24 to 8,192 tokens on an
# H100.
QUANTIZED_TILES = {
    1: {
        0: QuantizedTiles(16, 128, 5, 12),
        512: QuantizedTiles(64, 128, 4, 12),  # one tile an expert even of 64 tokens, which makes whole rounds of 132
        6144: QuantizedTiles(128, 128, 3, 12),
    },
    2: {
        0: QuantizedTiles(16, 128, 5, 12),
        1024: QuantizedTiles(32, 128, 4, 12),
        4096: QuantizedTiles(64, 128, 3, 12),
        6144: QuantizedTiles(128, 64, 4, 12),
    },
}


def mosaic_problem(width: int, inner: int, dtype: jnp.dtype) -> str | None:
    """Say what the backend does not take of D, F and the weights' dtype, or of the GPU, if anything."""
    if dtype != jnp.bfloat16 and not form_of(dtype):
        return f"takes bfloat16 and quantised weights, not {jnp.dtype(dtype).name}"
    for name, size in (("width", width), ("inner width", inner)):
        if size % 256 or not size:
            return f"takes multiples of 256, not an {name} of {size}"
    if kernels.capability() != "9.0":
        return f"is for GPUs of compute capability 9.0, not {kernels.capability()}"
    return None


def by_mosaic(x, chosen, weights, gate_up, down, first_expert, shared=None, live=None, addends=(), tiles=None):
    """Sort pairs by expert into rows and multiply them by the experts' weights where those lie.

    Has no gradient; see `mosaic_trained`.

    Work follows the pairs that have a local expert. Each expert's result is rounded to the dtype of `x` before the
    weighted sum, which is float32.

    Args:
      shared: quantised (gate_up [2, n F, D], down [D, n F]) of an MLP that all tokens go through, added unscaled: n
        experts more.
      live: how many tokens are no padding; None: all.
      addends: at most two arrays [T, D] that join the sum, in the dtype of `x`.
      tiles: an entry of TILES, of quantised weights of QUANTIZED_TILES; None chooses.

    Raises:
      UserError: if the sizes, the dtype or the GPU are not what it takes.
    """
    tokens, k = chosen.shape
    experts, _, inner, width = gate_up.shape
    check_experts(x, gate_up, down, *(shared or ()))
    more = 0 if shared is None else shared[1].shape[1] // inner
    pairs = tokens * (k + more)
    eight = multiplies_fp8(tokens, gate_up.dtype, experts=True)
    if shared is not None and not takes_along(tokens, gate_up.dtype):
        few = f"of up to {MOST} tokens, in fp8 {_FP8_EXPERTS - 1}"
        raise UserError(f"expert backend mosaic takes quantised shared experts along, {few}")
    x_sorted, factors = to_fp8(x) if eight else (x, jnp.zeros(0, jnp.float32))
    tiles = tiles or choose_tiles(pairs, jnp.bfloat16 if eight else gate_up.dtype)
    block = tiles[0].block
    blocks = min(pairs, pairs // block + experts + more)  # at most, all pairs local
    rows = pairs + min(pairs, experts + more) * (_ALIGNMENT - 1)
    rows = -(-rows // _ALIGNMENT) * _ALIGNMENT + block  # the last block reads so far
    counts = -(-tokens * k // 3072) * experts  # by chunks, as in pairs.cu
    here = jnp.stack([jnp.asarray(first_expert, jnp.int32), jnp.asarray(tokens if live is None else live, jnp.int32)])
    sizes = {"experts": experts, "shared": more}
    gathered, row_factors, which, count, place, _ = kernels.call(
        "ernie_sort_pairs",
        [
            jax.ShapeDtypeStruct((rows, width), x_sorted.dtype),
            jax.ShapeDtypeStruct((rows if eight else 0,), jnp.float32),
            jax.ShapeDtypeStruct((blocks, 3), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            jax.ShapeDtypeStruct((pairs,), jnp.int32),
            jax.ShapeDtypeStruct((counts,), jnp.int32),
        ],
        x_sorted,
        factors,
        chosen,
        here,
        **sizes,
        most=block,
    )
    up_shared, down_shared = (None, None) if shared is None else (shared[0], shared[1][None])

    arrays = which, count
    hidden = _multiply(gathered, gate_up, *arrays, tiles[0], up_shared, row_factors if eight else None)
    hidden, row_factors = to_fp8(hidden) if eight else (hidden, None)
    out = _multiply(hidden, down[:, None], *arrays, tiles[1], down_shared, row_factors)
    total = jax.ShapeDtypeStruct(x.shape, x.dtype)
    addends = *addends, *[jnp.zeros((0, width), x.dtype)] * (2 - len(addends))
    arrays = out, place, chosen, here, weights.astype(x.dtype)
    return kernels.call("ernie_combine_pairs", total, *addends, *arrays, **sizes)


def check_experts(x: jax.Array, gate_up: jax.Array | Quantized, *others: jax.Array | Quantized) -> None:
    """Check that the backend takes tokens [T, D] and weights, the first of which are [E, 2, F, D].

    Raises:
      UserError: if it does not.
    """
    _, _, inner, width = gate_up.shape
    problem = mosaic_problem(width, inner, gate_up.dtype) or operand_problem(x, gate_up, *others)
    if problem:
        raise UserError(f"expert backend mosaic {problem}; use expert backend blocks")


def choose_tiles(pairs: int, dtype: jnp.dtype) -> tuple[Tiles, Tiles] | tuple[QuantizedTiles, QuantizedTiles]:
    """Return the tiles of gate and up and of down, by the pairs of a token and an expert and the weights' dtype."""
    table = TILES
    if form := form_of(dtype):
        table = {least: (tiles, tiles) for least, tiles in QUANTIZED_TILES[2 if form == "int4" else 1].items()}
    return table[max(least for least in table if least <= pairs)]


def takes_along(tokens: int, dtype: jnp.dtype) -> bool:
    """Tell whether shared experts with weights of a dtype can be computed along with the chosen ones."""
    return tokens <= MOST and form_of(dtype) is not None and not multiplies_fp8(tokens, dtype, experts=True)


def multiplies_fp8(tokens: int, dtype: jnp.dtype, experts: bool = False) -> bool:
    """Tell whether tokens become fp8 as well to meet weights of a dtype: of experts, or of another product."""
    return form_of(dtype) == "fp8" and tokens >= (_FP8_EXPERTS if experts else _FP8_PRODUCTS)


def to_fp8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Round rows [M, K] to fp8; returns them and a float32 factor [M] for each, the largest of it being 448."""
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=1)
    factors = jnp.where(largest > 0, largest, 1) / 448
    return (wide / factors[:, None]).astype(jnp.float8_e4m3fn), factors


def product_problem(tokens: int, inner: int, outer: int, dtype: jnp.dtype) -> str | None:
    """Say what `product` does not take of [T, K] x [N, K] and the weights' dtype, or of the GPU, if anything."""
    form = form_of(dtype)
    if not form and dtype != jnp.bfloat16:
        return f"takes bfloat16 and quantised weights, not {jnp.dtype(dtype).name}"
    if tokens > MOST and not multiplies_fp8(tokens, dtype):
        return f"takes up to {MOST} tokens with {form or 'bfloat16'} weights, not {tokens}"
    columns = 128 if tokens <= MOST else 256
    if inner % 256 or outer % columns:
        return f"takes multiples of 256 inputs and of {columns} outputs, not {inner} and {outer}"
    if kernels.capability() != "9.0":
        return f"is for GPUs of compute capability 9.0, not {kernels.capability()}"
    return None


def product_pays(tokens: int, inner: int, outer: int, dtype: jnp.dtype) -> bool:
    """Tell whether `product` is faster than XLA's, of operands that it takes.

    Of bfloat16 weights it is where they are so few that XLA splits the inputs and adds the parts up in a kernel more,
    but enough for tiles on about half of the multiprocessors (a sweep of 32 to 256 tokens on an H100).
    """
    few = inner * outer <= 1 << 24
    return form_of(dtype) is not None or few and (tokens > 128 or tokens > 32 and outer >= 56 * 64)


def product(x: jax.Array, weight: jax.Array | Quantized) -> jax.Array:
    """Return x [T, K] times weight [N, K], transposed: [T, N] in bfloat16 or float32; all rows are one expert's.

    Raises:
      UserError: if the sizes, the dtypes or the GPU are not what it takes.
    """
    tokens, inner = x.shape
    problem = product_problem(tokens, inner, len(weight), weight.dtype) or operand_problem(x, weight)
    if problem:
        raise UserError(f"linear backend mosaic {problem}; use linear backend xla")
    eight, weight = multiplies_fp8(tokens, weight.dtype), weight[None, None]
    if not form_of(weight.dtype):
        tiles = _PRODUCT_TILES[tokens > 128]
    else:
        tiles = TILES[4096][1] if eight else choose_tiling(tokens, weight)
    out = _multiply_all(x, weight, tiles, eight)
    return (out if out.ndim == 2 else out.sum(0))[:tokens]


def mlp_problem(tokens: int, width: int, inner: int, dtype: jnp.dtype) -> str | None:
    """Say what `mlp` does not take of [T, D], of F, and of the weights' dtype, or of the GPU, if anything."""
    if dtype != jnp.bfloat16 and not multiplies_fp8(tokens, dtype, experts=True):
        return f"takes bfloat16 weights and of {_FP8_EXPERTS} tokens or more fp8, not {jnp.dtype(dtype).name}"
    if tokens > MOST:
        return f"takes up to {MOST} tokens, not {tokens}"
    return mosaic_problem(width, inner, dtype)


def mlp(
    x: jax.Array, gate_up: jax.Array | Quantized, down: jax.Array | Quantized, backend: str = "mosaic"
) -> jax.Array:
    """Return down(silu(gate x) * up x) [T, D] of x [T, D], gate_up [2, F, D] and down [D, F], bfloat16 or fp8.

    By two kernels that leave others room on the multiprocessors, so that they can run beside them.

    Raises:
      UserError: if the sizes, the dtypes or the GPU are not what it takes.
    """
    return MLP_BACKENDS[backend](x, gate_up, down)


def _mlp(x, gate_up, down):
    tokens, width = x.shape
    if problem := mlp_problem(tokens, width, down.shape[1], gate_up.dtype) or operand_problem(x):
        raise UserError(f"mlp backend mosaic {problem}")
    tiles, eight = TILES[0], form_of(gate_up.dtype) is not None
    hidden = _multiply_all(x, gate_up[None], tiles[0], eight)
    return _multiply_all(hidden, down[None, None], tiles[1], eight)[:tokens]


def _multiply_all(rows, weight, tiles, eight=False):
    """Multiply all rows, as fp8 if `eight`, by the only expert's weight; what is returned may have rows more."""
    count, block = len(rows), tiles.block
    blocks = [(0, at, min(block, count - at)) for at in range(0, count, block)]
    rows = jnp.pad(rows, ((0, -count % block), (0, 0)))
    rows, factors = to_fp8(rows) if eight else (rows, None)
    arrays = jnp.asarray(blocks, jnp.int32), jnp.asarray([len(blocks)], jnp.int32)
    return _multiply(rows, weight, *arrays, tiles, factors=factors)


def _multiply(rows, weight, blocks, live, tiles, shared=None, factors=None):
    """Call the kernel that takes these operands; `factors` are those of fp8 rows, `shared` quantised."""
    # Mosaic GPU, for Hopper GPUs only
    from ernie_jax.ops import mosaic_kernel, quantized_kernel

    if isinstance(weight, Quantized) and factors is None:
        turns = weight.values.shape[-1] // tiles.depth
        tiling = quantized_kernel.Tiling(*tiles)._replace(steps=min(tiles.steps, turns))
        return quantized_kernel.grouped_product(rows, weight, blocks, live, tiling, shared)
    turns = rows.shape[1] // mosaic_kernel.contracted(rows.dtype)
    tiling = mosaic_kernel.Tiling(*tiles)._replace(steps=min(tiles.steps, turns))
    if factors is None:
        return mosaic_kernel.grouped_product(rows, weight, blocks, live, tiling)
    scales = factors, weight.scales
    return mosaic_kernel.grouped_product(rows, weight.values, blocks, live, tiling, scales=scales)


def choose_tiling(tokens: int, weight: Quantized) -> QuantizedTiles:
    """Return how to cut up a product with a weight [1, 1, N, K]: into about as many tiles as multiprocessors."""
    *_, outputs, stored = weight.values.shape
    block = next(size for size in (16, 32, 64) if size >= min(tokens, 64))
    halves = 2 if outputs % 256 == 0 and outputs >= 96 * 256 else 1
    tiles, turns = outputs // (128 * halves) * -(-tokens // block), stored // _DEPTH
    splits = max(part for part in range(1, turns + 1) if turns % part == 0 and (part == 1 or tiles * part <= 132))
    step = _DEPTH * (128 * halves + block * 2 * weight.shape[-1] // stored)  # bytes
    left = _SHARED_MEMORY - 4 * block * 64 * (2 if splits == 1 else 4)
    return QuantizedTiles(block, _DEPTH, min(turns // splits, left // step, 6), 12, halves, splits)


MLP_BACKENDS = {"mosaic": _mlp}
