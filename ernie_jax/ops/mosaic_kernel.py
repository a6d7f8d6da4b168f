"""A grouped matrix product for Hopper GPUs, in Pallas for Mosaic GPU. Import it only where it is about to run."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_SMS = 132  # of an H100 or H200; right with any number, fastest with the real one
_INNER = 64  # contracted at a time: 128 bytes, the widest swizzle
_EPILOGUE = 64  # rows and columns that leave a warpgroup at a time


class Tiling(NamedTuple):
    """How a product is cut up. Two warpgroups multiply; a third one loads.

    Attributes:
      rows, columns: that one warpgroup accumulates, rows x weights; of a gated product half the columns are gates.
      split: what the two warpgroups divide, "rows" or "columns".
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


@functools.partial(jax.jit, static_argnames=("tiling", "interpret"))  # so that all layers share one lowering
def grouped_product(
    rows: jax.Array,  # [M, K]
    weight: jax.Array,  # [E, 1 or 2, N, K]
    expert: jax.Array,  # [M / block] int32
    live: jax.Array,  # [1] int32
    tiling: Tiling,
    interpret=None,
) -> jax.Array:
    """Multiply each block of rows by its expert's weight, transposed; with two weights return silu(first) * second.

    Args:
      expert: of each block of `tiling.block` rows.
      live: how many blocks are computed; the rows behind them come back undefined.
      interpret: parameters of Pallas' interpreter for tests.

    Returns:
      [M, N] in the dtype of `rows`; sums and silu are float32.

    Raises:
      ValueError: if the sizes are no multiples of the tiles.
    """
    (count, inner), (_, gates, outputs, _) = rows.shape, weight.shape
    width = tiling.columns // gates  # of the output, per warpgroup
    across = 2 if tiling.split == "columns" else 1  # warpgroups side by side
    block = tiling.block
    if (
        count % block
        or outputs % (width * across)
        or width % _EPILOGUE
        or inner % _INNER
        or inner // _INNER < tiling.steps
    ):
        raise ValueError(f"{tiling} does not divide rows {rows.shape} and weights {weight.shape}")
    column_tiles, turns = outputs // (width * across), inner // _INNER

    def tile_of(index, live):
        return plgpu.planar_snake(index, (live, column_tiles), 1, min(tiling.band, column_tiles))

    def load(refs, live, a, b, full, free):
        expert_ref, rows_ref, weight_ref = refs
        plgpu.set_max_registers(40, action="decrease")

        @plgpu.nd_loop((live * column_tiles,), collective_axes="sm")
        def _(info):
            row_tile, column_tile = tile_of(info.index[0], live)
            chosen = expert_ref[row_tile]

            @pl.loop(0, turns)
            def _(turn):
                step = info.local_index * turns + turn
                slot = lax.rem(step, tiling.steps)

                @pl.when(step >= tiling.steps)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                window = pl.ds(turn * _INNER, _INNER)
                source = rows_ref.at[pl.ds(row_tile * block, block), window]
                plgpu.copy_gmem_to_smem(source, a.at[slot], full.at[slot])
                for part in range(across * gates):
                    first = (column_tile * across + part // gates) * width
                    source = weight_ref.at[chosen, part % gates, pl.ds(first, width), window]
                    plgpu.copy_gmem_to_smem(source, b.at[slot, pl.ds(part * width, width)], full.at[slot])

        mine = lax.div(live * column_tiles + _SMS - 1 - lax.axis_index("sm"), _SMS) * turns

        @pl.loop(jnp.maximum(mine - tiling.steps, 0), mine)
        def _(step):
            plgpu.barrier_wait(free.at[lax.rem(step, tiling.steps)])  # no barrier is left half used

    def multiply(out_ref, live, a, b, out, full, free):
        group = lax.axis_index("wg")
        plgpu.set_max_registers(232, action="increase")
        down = group if tiling.split == "rows" else 0
        right = group if tiling.split == "columns" else 0

        @plgpu.nd_loop((live * column_tiles,), collective_axes="sm")
        def _(info):
            row_tile, column_tile = tile_of(info.index[0], live)

            def accumulate(total):
                @pl.loop(0, turns)
                def _(turn):
                    step = info.local_index * turns + turn
                    slot = lax.rem(step, tiling.steps)
                    plgpu.barrier_wait(full.at[slot])
                    left = a.at[slot, pl.ds(down * tiling.rows, tiling.rows)]
                    other = b.at[slot, pl.ds(right * tiling.columns, tiling.columns)]
                    plgpu.wgmma(total, left, other.transpose((1, 0)))
                    plgpu.wgmma_wait(1)  # the one before this is done with its buffers

                    @pl.when(turn > 0)
                    def _():
                        plgpu.barrier_arrive(free.at[lax.rem(step - 1, tiling.steps)])

                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[lax.rem(info.local_index * turns + turns - 1, tiling.steps)])
                return total[...]

            y = pl.run_scoped(accumulate, plgpu.ACC((tiling.rows, tiling.columns)))
            if gates == 2:
                gate = y[:, :width]
                y = gate / (1 + jnp.exp(-gate)) * y[:, width:]
            y = y.astype(out_ref.dtype)
            for piece in range(tiling.rows // _EPILOGUE * (width // _EPILOGUE)):
                i, j = divmod(piece, width // _EPILOGUE)
                i, j = i * _EPILOGUE, j * _EPILOGUE
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                out[group, piece % 2] = y[i : i + _EPILOGUE, j : j + _EPILOGUE]
                plgpu.commit_smem()
                target = out_ref.at[
                    pl.ds(row_tile * block + down * tiling.rows + i, _EPILOGUE),
                    pl.ds((column_tile * across + right) * width + j, _EPILOGUE),
                ]
                plgpu.copy_smem_to_gmem(out.at[group, piece % 2], target)

        plgpu.wait_smem_to_gmem(0)

    def body(expert_ref, live_ref, rows_ref, weight_ref, out_ref):
        swizzled = plgpu.TilingTransform((8, _INNER)), plgpu.SwizzleTransform(128)

        @functools.partial(
            pl.run_scoped,
            a=plgpu.SMEM((tiling.steps, block, _INNER), rows.dtype, transforms=swizzled),
            b=plgpu.SMEM((tiling.steps, across * tiling.columns, _INNER), rows.dtype, transforms=swizzled),
            out=plgpu.SMEM((2, 2, _EPILOGUE, _EPILOGUE), rows.dtype, transforms=swizzled),
            full=plgpu.Barrier(num_arrivals=1 + across * gates, num_barriers=tiling.steps),
            free=plgpu.Barrier(num_arrivals=2, num_barriers=tiling.steps),
            collective_axes="wg",
        )
        def _(a, b, out, full, free):
            live = live_ref[0]
            loads = lax.axis_index("wg") == 2
            pl.when(loads)(lambda: load((expert_ref, rows_ref, weight_ref), live, a, b, full, free))
            pl.when(jnp.logical_not(loads))(lambda: multiply(out_ref, live, a, b, out, full, free))

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((count, outputs), rows.dtype),
        grid=(_SMS,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({} if interpret is None else {"interpret": interpret}),
    )
    return kernel(expert, live, rows, weight)
