"""Causal attention of many new tokens over pages, in Pallas for Mosaic GPU. Import it only where it is about to run.

Two warpgroups that take turns at the tensor cores and a third one that loads, as in "FlashAttention-3" (Shah et al.,
2024), over the pages where they lie.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # queries of a warpgroup
TILE = 2 * ROWS
_COPIED = 8  # rows: of fewer no tile is copied


@functools.partial(jax.jit, static_argnames=("block", "steps", "interpret"))  # one lowering for all layers
def attend_tiles(
    q: jax.Array,  # [T, N, H]
    pages: jax.Array,  # [P, page_size, 2K, H]
    table: jax.Array,  # [B, M] int32
    tiles: jax.Array,  # [tiles, 6] int32
    block: int = 128,
    steps: int = 2,
    interpret=None,
) -> jax.Array:
    """Attend each tile of 128 consecutive tokens over the pages of one sequence.

    Args:
      tiles: of each, its first row of `q` and of the output; the position of that token; how many blocks of cached
        positions it looks at, 0 if it is none; its row of the table; from which of its rows on and up to which one it
        writes. All rows are multiples of 8. Those that are not the sequence's come out as if they continued it.
      block: cached positions looked at together; divides the page size.
      steps: blocks of keys, and of values, in flight.
      interpret: parameters of Pallas' interpreter, for tests.

    Returns:
      [T, N, H] in the dtype of `q`; rows that no tile writes are undefined.
    """
    _, heads, head_dim = q.shape
    page_size, kv_heads = pages.shape[1], pages.shape[2] // 2
    parts = page_size // block
    scale = head_dim**-0.5 * math.log2(math.e)

    def load(refs, tile, head, blocks, keys, values, barriers):
        table_ref, pages_ref = refs
        k_full, v_full, k_free, v_free = barriers
        plgpu.set_max_registers(40, action="decrease")
        row, kv = tile[3], lax.div(head, heads // kv_heads)

        @pl.loop(0, blocks)
        def _(step):
            slot = lax.rem(step, steps)
            page = table_ref[row, lax.div(step, parts)]
            source = pages_ref.at[page, pl.ds(lax.rem(step, parts) * block, block)]
            for offset, buffer, full, free in ((0, keys, k_full, k_free), (1, values, v_full, v_free)):

                @pl.when(step >= steps)
                def _(free=free):
                    plgpu.barrier_wait(free.at[slot])

                plgpu.copy_gmem_to_smem(source.at[:, 2 * kv + offset], buffer.at[slot], full.at[slot])

        @pl.loop(jnp.maximum(blocks - steps, 0), blocks)
        def _(step):
            for free in (k_free, v_free):
                plgpu.barrier_wait(free.at[lax.rem(step, steps)])  # no barrier is left half used

    def multiply(q_ref, out_ref, tile, head, blocks, q_buffer, keys, values, barriers, q_full, turn):
        group = lax.axis_index("wg")
        k_full, v_full, k_free, v_free = barriers
        plgpu.set_max_registers(232, action="increase")
        q_buffer = q_buffer.at[group]
        first, written_from, written_to = (tile[0] + group * ROWS, *(at - group * ROWS for at in tile[4:]))
        position = tile[1] + group * ROWS  # of the first query

        def take_turn():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        plgpu.copy_gmem_to_smem(q_ref.at[pl.ds(first, ROWS), head], q_buffer, q_full.at[group])
        plgpu.barrier_wait(q_full.at[group])
        layout = plgpu.Layout.WGMMA
        maximum = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), layout.reduce(1))
        total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), layout.reduce(1))
        out = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), layout)

        def step_of(step, carry, masked):
            out, maximum, total = carry
            slot = lax.rem(step, steps)
            plgpu.barrier_wait(k_full.at[slot])

            def score(acc):
                plgpu.wgmma(acc, q_buffer, keys.at[slot].transpose((1, 0)))
                take_turn()  # the other warpgroup's softmax ends; its products may queue behind these
                return acc[...]

            scores = pl.run_scoped(score, plgpu.ACC((ROWS, block)))
            plgpu.barrier_arrive(k_free.at[slot])
            if masked:
                query = plgpu.broadcasted_iota(jnp.int32, (ROWS, block), 0, layout=layout)
                key = plgpu.broadcasted_iota(jnp.int32, (ROWS, block), 1, layout=layout)
                scores = jnp.where(query + position >= key + step * block, scores, -jnp.inf)
            new_maximum = jnp.maximum(maximum, scores.max(axis=1) * scale)
            rescale = jnp.exp2(maximum - new_maximum)
            weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(new_maximum, scores.shape, [0]))
            total = total * rescale + weights.sum(axis=1)
            out = out * lax.broadcast_in_dim(rescale, out.shape, [0])
            weights = weights.astype(q.dtype)
            out, new_maximum, total, weights = lax.optimization_barrier((out, new_maximum, total, weights))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_full.at[slot])
            plgpu.barrier_wait(turn)

            out = add_product(out, weights, values.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
            return out, new_maximum, total

        pl.when(group == 1)(take_turn)  # half a step behind the other
        whole = jnp.clip(lax.div(position + 1, block), 0, blocks)  # blocks that all of these queries see
        carry = lax.fori_loop(0, whole, functools.partial(step_of, masked=False), (out, maximum, total))
        out, _, total = lax.fori_loop(whole, blocks, functools.partial(step_of, masked=True), carry)
        pl.when(group == 0)(take_turn)
        q_buffer[...] = (out / lax.broadcast_in_dim(total, out.shape, [0])).astype(q.dtype)
        plgpu.commit_smem()

        all_rows = (written_from <= 0) & (written_to >= ROWS)

        @pl.when(all_rows)
        def _():
            plgpu.copy_smem_to_gmem(q_buffer, out_ref.at[pl.ds(first, ROWS), head])

        for start in range(0, ROWS, _COPIED):  # the others are another tile's

            @pl.when(jnp.logical_not(all_rows) & (start >= written_from) & (start < written_to))
            def _(start=start):
                part = out_ref.at[pl.ds(first + start, _COPIED), head]
                plgpu.copy_smem_to_gmem(q_buffer.at[pl.ds(start, _COPIED)], part)

        plgpu.wait_smem_to_gmem(0)

    def body(tiles_ref, table_ref, q_ref, pages_ref, out_ref):
        index = lax.axis_index("work")
        which, head = lax.div(index, heads), lax.rem(index, heads)
        tile = [tiles_ref[which, i] for i in range(6)]
        swizzled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
        buffers = plgpu.SMEM((steps, block, head_dim), q.dtype, transforms=swizzled)

        blocks = tile[2]

        @pl.when(blocks > 0)
        def _():
            @functools.partial(
                pl.run_scoped,
                q_buffer=plgpu.SMEM((2, ROWS, head_dim), q.dtype, transforms=swizzled),
                keys=buffers,
                values=buffers,
                barriers=(plgpu.Barrier(num_barriers=steps),) * 2
                + (plgpu.Barrier(num_arrivals=2, num_barriers=steps),) * 2,
                q_full=plgpu.Barrier(num_barriers=2),
                turn=plgpu.Barrier(num_arrivals=2),
                collective_axes="wg",
            )
            def _(q_buffer, keys, values, barriers, q_full, turn):
                loads = lax.axis_index("wg") == 2

                @pl.when(loads)
                def _():
                    load((table_ref, pages_ref), tile, head, blocks, keys, values, barriers)

                @pl.when(jnp.logical_not(loads))
                def _():
                    multiply(q_ref, out_ref, tile, head, blocks, q_buffer, keys, values, barriers, q_full, turn)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(len(tiles) * heads,),
        grid_names=("work",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({} if interpret is None else {"interpret": interpret}),
    )
    return kernel(tiles, table, q, pages)


def add_product(out, weights, values):
    """Return out [rows, H] + weights [rows, block] x values [block, H]; a function because no interpreter knows it."""
    return pl.run_state(lambda sums: plgpu.wgmma(sums, weights, values))(plgpu.ACC.init(out))
