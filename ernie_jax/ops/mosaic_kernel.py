"""A grouped matrix product for Hopper GPUs, in Pallas for Mosaic GPU. Import it only where it is about to run."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_SMS = 132  # of an H100 or H200; right with any number, fastest with the real one
_BYTES = 128  # of a row that are contracted at a time: the widest swizzle
_EPILOGUE = 64  # rows and columns that leave a warpgroup at a time
_LOADED_ROWS = (16, 32, 64)  # at a time, of a block that has no more
ALIGNMENT = 8  # rows, at a multiple of which an expert's rows begin: those of a tile in shared memory


class Tiling(NamedTuple):
    """How a product is cut up. One or two warpgroups multiply; a further one loads.

    Attributes:
      rows, columns: that one warpgroup accumulates, rows x weights; of a gated product half the columns are gates.
      split: "rows": two warpgroups divide these, and each of CUDA's blocks takes its share of the tiles one after the
        other. Or "tiles": one warpgroup, and a block for each tile, two at once on a multiprocessor, as they come.
      steps: loads in flight.
      band: column tiles that are walked together, for the second-level cache.
    """

    rows: int
    columns: int
    split: str
    steps: int
    band: int

    @property
    def block(self) -> int:
        """Rows of a tile; they all belong to one expert."""
        return self.rows * (2 if self.split == "rows" else 1)


@functools.partial(jax.jit, static_argnames=("tiling", "turned", "interpret"))  # so that all layers share one lowering
def grouped_product(
    rows: jax.Array,  # [M, K]
    weight: jax.Array,  # [E, 1 or 2, N, K]
    blocks: jax.Array,  # [blocks, 3] int32
    live: jax.Array,  # [1] int32
    tiling: Tiling,
    scales: tuple[jax.Array, jax.Array] | None = None,  # [M], [E, 1 or 2, N] float32
    turned: bool = False,
    adapter: tuple[jax.Array, jax.Array] | None = None,  # [M, R], [E, 1, N, R]
    interpret=None,
) -> jax.Array:
    """Multiply each block of rows by its expert's weight, transposed; with two weights return silu(first) * second.

    Args:
      blocks: of each its expert, its first row (a multiple of ALIGNMENT) and how many rows it has, at most
        `tiling.block`. That many rows can be read from the first one on.
      live: how many blocks there are; rows of no block come back undefined.
      scales: of rows and weights that are both fp8, what sums are multiplied by.
      turned: the weights are [E, 1, K, N] and not transposed; of bfloat16.
      adapter: further rows and weights, turned [E, 1, R, N], whose product joins the same sums: of bfloat16.
      interpret: parameters of Pallas' interpreter for tests.

    Returns:
      [M, N] in the dtype of `rows`, of fp8 rows bfloat16; sums and silu are float32.

    Raises:
      ValueError: if the sizes are no multiples of the tiles.
    """
    (count, inner), (_, gates, outputs, _) = rows.shape, weight.shape
    if turned:
        outputs = weight.shape[3]
    width = tiling.columns // gates  # of the output, per warpgroup
    block, step_inner = tiling.block, contracted(rows.dtype)
    multiplying = block // tiling.rows  # warpgroups
    dtype = rows.dtype if scales is None else jnp.bfloat16
    rank = 0 if adapter is None else adapter[0].shape[1]
    ragged = outputs % width or width % _EPILOGUE or inner % step_inner or rank % step_inner
    if ragged or inner // step_inner < tiling.steps:
        raise ValueError(f"{tiling} does not divide rows {rows.shape}, weights {weight.shape} and a rank of {rank}")
    sizes = [0, *(size for size in _LOADED_ROWS if size < block), block]
    column_tiles, own_turns = outputs // width, inner // step_inner
    turns = own_turns + rank // step_inner
    running = len(blocks) * column_tiles if multiplying == 1 else _SMS  # CUDA's blocks

    def tile_of(index, live):
        return plgpu.planar_snake(index, (live, column_tiles), 1, min(tiling.band, column_tiles))

    def load(refs, live, a, b, full, free):
        blocks_ref, rows_ref, weight_ref, adapter_refs = refs
        if multiplying == 2:
            plgpu.set_max_registers(40, action="decrease")

        @plgpu.nd_loop((live * column_tiles,), collective_axes="sm")
        def _(info):
            row_tile, column_tile = tile_of(info.index[0], live)
            chosen, first_row = blocks_ref[row_tile, 0], pl.multiple_of(blocks_ref[row_tile, 1], ALIGNMENT)
            rows_here = blocks_ref[row_tile, 2]

            @pl.loop(0, turns)
            def _(turn):
                step = info.local_index * turns + turn
                slot = lax.rem(step, tiling.steps)

                @pl.when(step >= tiling.steps)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                def load_weights(weight_ref, turn, part):
                    first = column_tile * width
                    target = None if turned else b.at[slot, pl.ds(part * width, width)]

                    def load_chosen():
                        window = pl.ds(first, width), pl.ds(turn * step_inner, step_inner)
                        plgpu.copy_gmem_to_smem(weight_ref.at[chosen, part, *window], target, full.at[slot])

                    def load_turned():
                        window = pl.ds(turn * step_inner, step_inner), pl.ds(first, width)
                        plgpu.copy_gmem_to_smem(weight_ref.at[chosen, 0, *window], b.at[slot], full.at[slot])

                    (load_turned if turned else load_chosen)()

                def load_turn(rows_ref, weight_ref, turn):
                    for part in range(gates):
                        load_weights(weight_ref, turn, part)

                    def load_rows(size):
                        source = rows_ref.at[pl.ds(first_row, size), pl.ds(turn * step_inner, step_inner)]
                        plgpu.copy_gmem_to_smem(source, a.at[slot, pl.ds(0, size)], full.at[slot])

                    # Whole blocks of few rows would read as much from the second-level cache as the weights are.
                    for less, size in itertools.pairwise(sizes):
                        pl.when((rows_here > less) & (rows_here <= size))(functools.partial(load_rows, size))

                if adapter is None:
                    load_turn(rows_ref, weight_ref, turn)
                else:
                    pl.when(turn < own_turns)(lambda: load_turn(rows_ref, weight_ref, turn))
                    pl.when(turn >= own_turns)(lambda: load_turn(*adapter_refs, turn - own_turns))

        mine = lax.div(live * column_tiles + running - 1 - lax.axis_index("sm"), running) * turns

        @pl.loop(jnp.maximum(mine - tiling.steps, 0), mine)
        def _(step):
            plgpu.barrier_wait(free.at[lax.rem(step, tiling.steps)])  # no barrier is left half used

    def multiply(blocks_ref, scales_refs, out_ref, live, a, b, out, full, free):
        group = lax.axis_index("wg")
        if multiplying == 2:
            plgpu.set_max_registers(232, action="increase")

        def scaled(part, gate, row_tile, column):
            """Multiply a gate's or an up's sums by the scales of its rows and weights."""
            of_rows = scales_refs[0].at[pl.ds(blocks_ref[row_tile, 1] + group * tiling.rows, tiling.rows)]
            of_weights = scales_refs[1].at[blocks_ref[row_tile, 0], gate, pl.ds(column, width)]
            for axis, ref in enumerate((of_rows, of_weights)):
                factor = plgpu.layout_cast(plgpu.load(ref, optimized=False), plgpu.Layout.WGMMA.reduce(1 - axis))
                part *= lax.broadcast_in_dim(factor, part.shape, [axis])
            return part

        @plgpu.nd_loop((live * column_tiles,), collective_axes="sm")
        def _(info):
            row_tile, column_tile = tile_of(info.index[0], live)

            def accumulate(total):
                @pl.loop(0, turns)
                def _(turn):
                    step = info.local_index * turns + turn
                    slot = lax.rem(step, tiling.steps)
                    plgpu.barrier_wait(full.at[slot])
                    left = a.at[slot, pl.ds(group * tiling.rows, tiling.rows)]
                    right = b.at[slot] if turned else b.at[slot].transpose((1, 0))
                    plgpu.wgmma(total, left, right)
                    plgpu.wgmma_wait(1)  # the one before this is done with its buffers

                    @pl.when(turn > 0)
                    def _():
                        plgpu.barrier_arrive(free.at[lax.rem(step - 1, tiling.steps)])

                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[lax.rem(info.local_index * turns + turns - 1, tiling.steps)])
                return total[...]

            y = pl.run_scoped(accumulate, plgpu.ACC((tiling.rows, tiling.columns)))
            parts = [y[:, gate * width : (gate + 1) * width] for gate in range(gates)]
            if scales is not None:
                parts = [scaled(part, gate, row_tile, column_tile * width) for gate, part in enumerate(parts)]
            y = parts[0]
            if gates == 2:
                y = y / (1 + jnp.exp(-y)) * parts[1]
            y = y.astype(dtype)
            first_row, rows_here = pl.multiple_of(blocks_ref[row_tile, 1], ALIGNMENT), blocks_ref[row_tile, 2]
            pieces = tiling.rows // _EPILOGUE * (width // _EPILOGUE)
            for piece in range(pieces):
                i, j = divmod(piece, width // _EPILOGUE)
                buffer = lax.rem(info.local_index * pieces + piece, 2)  # not that of the piece before, of a tile before
                i, j = i * _EPILOGUE, j * _EPILOGUE
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                out[group, buffer] = y[i : i + _EPILOGUE, j : j + _EPILOGUE]
                plgpu.commit_smem()
                i += group * tiling.rows

                def store(at, size, i=i, j=j, buffer=buffer):
                    columns = pl.ds(column_tile * width + j, _EPILOGUE)
                    source = out.at[group, buffer, pl.ds(at, size)]
                    plgpu.copy_smem_to_gmem(
                        source, out_ref.at[pl.ds(first_row + i + at, size), columns], commit_group=False
                    )

                # Of a group without stores Pallas' interpreter takes no note: it would think the last one still read.
                pl.when(rows_here <= i)(functools.partial(plgpu.wait_smem_to_gmem, 0, wait_read_only=True))
                # The rows behind the block's are another's.
                whole = rows_here >= i + _EPILOGUE
                pl.when(whole)(functools.partial(store, 0, _EPILOGUE))
                for at in range(0, _EPILOGUE, ALIGNMENT):
                    some = jnp.logical_not(whole) & (rows_here > i + at)
                    pl.when(some)(functools.partial(store, at, ALIGNMENT))
                plgpu.commit_smem_to_gmem_group()

        plgpu.wait_smem_to_gmem(0)

    more, structure = jax.tree.flatten((scales, adapter))

    def body(blocks_ref, live_ref, rows_ref, weight_ref, *refs):
        *refs, out_ref = refs
        scales_refs, adapter_refs = jax.tree.unflatten(structure, refs)

        def swizzled(size):
            return plgpu.TilingTransform((8, size)), plgpu.SwizzleTransform(_BYTES)

        loaded = swizzled(step_inner)  # for 2 bytes, also of turned weights
        weight_tile = (step_inner, tiling.columns) if turned else (tiling.columns, step_inner)

        @functools.partial(
            pl.run_scoped,
            a=plgpu.SMEM((tiling.steps, block, step_inner), rows.dtype, transforms=loaded),
            b=plgpu.SMEM((tiling.steps, *weight_tile), rows.dtype, transforms=loaded),
            out=plgpu.SMEM((multiplying, 2, _EPILOGUE, _EPILOGUE), dtype, transforms=swizzled(_EPILOGUE)),
            full=plgpu.Barrier(num_arrivals=1 + gates, num_barriers=tiling.steps),
            free=plgpu.Barrier(num_arrivals=multiplying, num_barriers=tiling.steps),
            collective_axes="wg",
        )
        def _(a, b, out, full, free):
            live = live_ref[0]
            loads = lax.axis_index("wg") == multiplying
            refs = blocks_ref, rows_ref, weight_ref, adapter_refs
            pl.when(loads)(lambda: load(refs, live, a, b, full, free))
            pl.when(jnp.logical_not(loads))(
                lambda: multiply(blocks_ref, scales_refs, out_ref, live, a, b, out, full, free)
            )

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((count, outputs), dtype),
        grid=(running,),
        grid_names=("sm",),
        num_threads=multiplying + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({} if interpret is None else {"interpret": interpret}),
    )
    return kernel(blocks, live, rows, weight, *more)


def contracted(dtype: jnp.dtype) -> int:
    """Return how many inputs of a dtype are contracted at a time."""
    return _BYTES // jnp.dtype(dtype).itemsize
