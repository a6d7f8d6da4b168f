"""The gradient of stacked weights, in Pallas for Mosaic GPU. Import it only where it is about to run."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ernie_jax.ops import mosaic_kernel

STEP = 64  # rows contracted at a time, at a multiple of which an expert's rows begin
_ROWS = 128  # of a tile, over two warpgroups
_COLUMNS = 256, 64  # of a tile, the most that divide what is there: those of adapters are few
_EPILOGUE = 64  # rows and columns that leave a warpgroup at a time


@functools.partial(jax.jit, static_argnames=("steps", "interpret"))  # so that all layers share one lowering
def grouped_outer_product(
    left: jax.Array,  # [M, N]
    right: jax.Array,  # [M, K]
    groups: jax.Array,  # [E, 2] int32
    steps: int = 4,
    interpret=None,
) -> jax.Array:
    """Contract each expert's rows of two arrays with each other; the sums are float32.

    Args:
      groups: of each expert its first row divided by STEP, and how many times STEP rows it has; rows that are none of
        its own are zero on both sides.
      steps: loads in flight.
      interpret: parameters of Pallas' interpreter for tests.

    Returns:
      [E, N, K] in the dtype of `left`.

    Raises:
      ValueError: if the sizes are no multiples of the tiles.
    """
    (_, outputs), (_, inner), experts = left.shape, right.shape, len(groups)
    columns = next((size for size in _COLUMNS if inner % size == 0), None)
    if outputs % _ROWS or columns is None:
        raise ValueError(f"tiles of {_ROWS} x {_COLUMNS[-1]} do not divide {outputs} x {inner}")
    down, across, pieces = outputs // _ROWS, inner // columns, columns // _EPILOGUE

    def tile_of(index):
        expert, place = lax.div(index, down * across), lax.rem(index, down * across)
        return expert, *plgpu.planar_snake(place, (down, across), 1, min(8, across))

    def each_tile(work):
        """Call work(tile, first row, steps before it, its steps) and return how many steps there were."""

        @plgpu.nd_loop((experts * down * across,), collective_axes="sm", init_carry=jnp.int32(0))
        def count(info, carry):
            return carry + work(info, carry)

        return count

    def load(groups_ref, left_ref, right_ref, a, b, full, free):
        plgpu.set_max_registers(40, action="decrease")

        def work(info, before):
            expert, i, j = tile_of(info.index[0])
            first, turns = groups_ref[expert, 0], groups_ref[expert, 1]

            @pl.loop(0, turns)
            def _(turn):
                slot = lax.rem(before + turn, steps)

                @pl.when(before + turn >= steps)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                rows = pl.ds((first + turn) * STEP, STEP)
                plgpu.copy_gmem_to_smem(left_ref.at[rows, pl.ds(i * _ROWS, _ROWS)], a.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(right_ref.at[rows, pl.ds(j * columns, columns)], b.at[slot], full.at[slot])

            return turns

        total = each_tile(work)

        @pl.loop(jnp.maximum(total - steps, 0), total)
        def _(step):
            plgpu.barrier_wait(free.at[lax.rem(step, steps)])  # no barrier is left half used

    def multiply(groups_ref, out_ref, a, b, out, full, free):
        group = lax.axis_index("wg")
        plgpu.set_max_registers(232, action="increase")

        def work(info, before):
            expert, i, j = tile_of(info.index[0])
            turns = groups_ref[expert, 1]

            def accumulate(total):
                @pl.loop(0, turns)
                def _(turn):
                    slot = lax.rem(before + turn, steps)
                    plgpu.barrier_wait(full.at[slot])
                    mine = a.at[slot, :, pl.ds(group * _EPILOGUE, _EPILOGUE)]
                    plgpu.wgmma(total, mine.transpose((1, 0)), b.at[slot])
                    plgpu.wgmma_wait(1)  # the one before this is done with its buffers

                    @pl.when(turn > 0)
                    def _():
                        plgpu.barrier_arrive(free.at[lax.rem(before + turn - 1, steps)])

                plgpu.wgmma_wait(0)

                @pl.when(turns > 0)
                def _():
                    plgpu.barrier_arrive(free.at[lax.rem(before + turns - 1, steps)])

                return total[...]

            y = pl.run_scoped(accumulate, plgpu.ACC((_EPILOGUE, columns))).astype(left.dtype)
            for piece in range(pieces):
                buffer = lax.rem(info.local_index * pieces + piece, 2)  # not that of the piece before, of a tile before
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                out[group, buffer] = y[:, piece * _EPILOGUE : (piece + 1) * _EPILOGUE]
                plgpu.commit_smem()
                window = (
                    pl.ds(i * _ROWS + group * _EPILOGUE, _EPILOGUE),
                    pl.ds(j * columns + piece * _EPILOGUE, _EPILOGUE),
                )
                plgpu.copy_smem_to_gmem(out.at[group, buffer], out_ref.at[expert, *window])
            return turns

        each_tile(work)
        plgpu.wait_smem_to_gmem(0)

    def body(groups_ref, left_ref, right_ref, out_ref):
        swizzled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)

        @functools.partial(
            pl.run_scoped,
            a=plgpu.SMEM((steps, STEP, _ROWS), left.dtype, transforms=swizzled),
            b=plgpu.SMEM((steps, STEP, columns), left.dtype, transforms=swizzled),
            out=plgpu.SMEM((2, 2, _EPILOGUE, _EPILOGUE), left.dtype, transforms=swizzled),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=steps),
            free=plgpu.Barrier(num_arrivals=2, num_barriers=steps),
            collective_axes="wg",
        )
        def _(a, b, out, full, free):
            loads = lax.axis_index("wg") == 2
            pl.when(loads)(lambda: load(groups_ref, left_ref, right_ref, a, b, full, free))
            pl.when(jnp.logical_not(loads))(lambda: multiply(groups_ref, out_ref, a, b, out, full, free))

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((experts, outputs, inner), left.dtype),
        grid=(mosaic_kernel._SMS,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({} if interpret is None else {"interpret": interpret}),
    )
    return kernel(groups, left, right)
