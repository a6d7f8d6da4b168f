"""The "mosaic" backend of the grouped expert MLP: many tokens on Hopper GPUs, pairs sorted by expert."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ernie_jax.errors import UserError
from ernie_jax.kernels import capability
from ernie_jax.ops.precision import swiglu


class Tiles(NamedTuple):
    """How our kernel cuts a product up; see `mosaic_kernel.Tiling`."""

    rows: int
    columns: int
    split: str
    steps: int
    band: int


class RaggedTiles(NamedTuple):
    """How JAX's own kernel, `ragged_dot`, cuts a product up."""

    block_m: int
    block_n: int
    block_k: int
    max_concurrent_steps: int
    grid_block_n: int


# From so many pairs of a token and an expert on: gate and up, down. Ours must agree in the rows of a block. Filled in
# from benchmarks/prefill_ops.py on an H100.
TILES = {
    0: (Tiles(64, 256, "rows", 4, 12), Tiles(64, 256, "rows", 4, 10)),
    24576: (Tiles(64, 256, "rows", 4, 12), Tiles(64, 256, "rows", 4, 10)),
    73728: (Tiles(64, 256, "rows", 4, 12), Tiles(64, 256, "rows", 4, 10)),
}

_LANE = 128  # pairs that are compared with each other to rank them


def mosaic_problem(width: int, inner: int, dtype: jnp.dtype) -> str | None:
    """Say what the backend does not take of D, F and the weights' dtype, or of the GPU, if anything."""
    if dtype != jnp.bfloat16:
        return f"takes bfloat16, not {jnp.dtype(dtype).name}"
    for name, size in (("width", width), ("inner width", inner)):
        if size % 256 or not size:
            return f"takes multiples of 256, not an {name} of {size}"
    if capability() != "9.0":
        return f"is for GPUs of compute capability 9.0, not {capability()}"
    return None


def by_mosaic(x, chosen, weights, gate_up, down, first_expert, tiles=None, interpret=None):
    """Sort pairs by expert into rows and multiply them by the experts' weights where those lie. Has no gradient.

    Work follows the pairs that have a local expert. Each expert's result is rounded to the dtype of `x` before the
    weighted sum, which is float32.

    Args:
      tiles: an entry of TILES; None chooses.
      interpret: parameters of Pallas' interpreter, for tests.

    Raises:
      UserError: if the sizes, the dtype or the GPU are not what it takes.
    """
    tokens, k = chosen.shape
    experts, _, inner, width = gate_up.shape
    if interpret is None and (problem := mosaic_problem(width, inner, gate_up.dtype)):
        raise UserError(f"expert backend mosaic {problem}; use expert backend blocks")
    pairs = tokens * k
    tiles = tiles or TILES[max(least for least in TILES if least <= pairs)]
    ours = isinstance(tiles[0], Tiles)
    block = tiles[0].rows * (2 if tiles[0].split == "rows" else 1) if ours else 1
    expert, sizes, rank = rank_pairs(chosen - first_expert, experts)
    blocks = -(-sizes // block)
    ends = jnp.cumsum(blocks)
    most = min(pairs, pairs // block + experts) if ours else pairs  # blocks, all pairs local
    local = expert < experts
    place = jnp.append(ends - blocks, 0)[expert] * block + rank  # row of each pair
    place = jnp.where(local, place, most * block + jnp.arange(pairs))  # out of bounds, each one differently
    token = jnp.zeros(most * block, jnp.int32)
    token = token.at[place].set(jnp.arange(pairs, dtype=jnp.int32) // k, mode="drop", unique_indices=True)
    rows = x.at[token].get(mode="promise_in_bounds")
    if ours:
        of_block = jnp.minimum((ends <= jnp.arange(most)[:, None]).sum(1, dtype=jnp.int32), experts - 1)
        out = _ours(rows, gate_up, down, of_block, ends[-1:].astype(jnp.int32), tiles, interpret)
    else:
        out = _kept(rows, gate_up, down, sizes.astype(jnp.int32), tiles)
    # Rows without a pair hold whatever was in memory: read none of them.
    place = place.reshape(tokens, k)
    total = jnp.zeros(x.shape, jnp.float32)
    for slot in range(k):  # one loop over the output; a sum over an axis of k would be a reduction
        y = out.at[place[:, slot]].get(mode="fill", fill_value=0, unique_indices=True).astype(jnp.float32)
        total += y * weights[:, slot, None].astype(jnp.float32)
    return total.astype(x.dtype)


def rank_pairs(chosen: jax.Array, experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Count instead of sorting: where a pair is among those of its expert.

    Args:
      chosen: [T, k] int32, of which 0 to experts - 1 are local.

    Returns:
      expert [T * k] of each pair, `experts` where it is not local; sizes [experts], how many pairs each has; rank
      [T * k] among the pairs of the same expert.
    """
    expert = jnp.where((chosen >= 0) & (chosen < experts), chosen, experts).reshape(-1)
    pairs = len(expert)
    lanes = jnp.pad(expert, (0, -pairs % _LANE), constant_values=experts).reshape(-1, _LANE)
    counts = (lanes[:, :, None] == jnp.arange(experts + 1)).sum(1, dtype=jnp.int32)  # [lanes, experts + 1]
    before = jnp.cumsum(counts, axis=0) - counts
    earlier = jnp.arange(_LANE)[:, None] > jnp.arange(_LANE)
    within = ((lanes[:, :, None] == lanes[:, None, :]) & earlier).sum(2, dtype=jnp.int32)
    rank = within + jnp.take_along_axis(before, lanes, axis=1)
    return expert, counts.sum(0)[:-1], rank.reshape(-1)[:pairs]


def _ours(rows, gate_up, down, of_block, live, tiles, interpret):
    from ernie_jax.ops.mosaic_kernel import Tiling, grouped_product  # Mosaic GPU, which only Hopper GPUs need

    hidden = grouped_product(rows, gate_up, of_block, live, Tiling(*tiles[0]), interpret)
    return grouped_product(hidden, down[:, None], of_block, live, Tiling(*tiles[1]), interpret)


def _kept(rows, gate_up, down, sizes, tiles):
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot  # as above

    def product(x, weight, tiles):
        return ragged_dot(x, weight, group_sizes=sizes, transpose_rhs=True, **tiles._asdict())

    experts, _, inner, width = gate_up.shape
    hidden = product(rows, gate_up.reshape(experts, 2 * inner, width), tiles[0])
    return product(swiglu(hidden.reshape(-1, 2, inner), axis=1), down, tiles[1])
