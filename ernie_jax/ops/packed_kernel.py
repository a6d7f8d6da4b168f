"""Causal attention within the documents of packed rows, and its gradient, in Pallas for Mosaic GPU.

Import it only where it is about to run. The forward pass is that of `prefill_kernel` over keys that are not in pages.
The gradient is two kernels, one by tiles of queries and one by tiles of keys, so that no sum's order depends on time.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # queries, or keys, of a warpgroup
TILE = 2 * ROWS
_MASKED = -1e30  # finite: a row of a later document may see nothing of the first blocks
_LOADS = 2  # the warpgroup that loads; the two before it multiply
_WGMMA = plgpu.Layout.WGMMA
_SWIZZLED = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)


@functools.partial(jax.jit, static_argnames=("block", "steps", "interpret"))  # one lowering for all layers
def attend(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, T, K, H]
    v: jax.Array,  # [B, T, K, H]
    first: jax.Array,  # [B, T] int32
    block: int = 128,
    steps: int = 2,
    interpret=None,
) -> tuple[jax.Array, jax.Array]:
    """Attend each query to the keys of its row from `first` up to itself.

    Args:
      first: where the document of each position begins.
      block: keys looked at together.
      steps: blocks of keys, and of values, in flight.
      interpret: parameters of Pallas' interpreter, for tests.

    Returns:
      Output [B, T, N, H], and [B, N, T] float32, the logarithm to base 2 of what the exponentials add up to.
    """
    rows, length, heads, head_dim = q.shape
    group_size = heads // k.shape[2]
    scale = head_dim**-0.5 * math.log2(math.e)

    def load(where, k_ref, v_ref, keys, values, barriers):
        row, head, _, begin, end = where
        k_full, v_full, k_free, v_free = barriers
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, end - begin)
        def _(step):
            slot = lax.rem(step, steps)
            window = row, pl.ds((begin + step) * block, block), lax.div(head, group_size)
            for ref, buffer, full, free in ((k_ref, keys, k_full, k_free), (v_ref, values, v_full, v_free)):

                @pl.when(step >= steps)
                def _(free=free):
                    plgpu.barrier_wait(free.at[slot])

                plgpu.copy_gmem_to_smem(ref.at[window], buffer.at[slot], full.at[slot])

        drain(end - begin, steps, (k_free, v_free))

    def multiply(where, refs, q_buffer, keys, values, sums, barriers, q_full, turn):
        row, head, start, begin, end = where
        first_ref, q_ref, out_ref, sums_ref = refs
        k_full, v_full, k_free, v_free = barriers
        group = lax.axis_index("wg")
        plgpu.set_max_registers(232, action="increase")
        q_buffer, sums, position = q_buffer.at[group], sums.at[group], start + group * ROWS
        mine = row, pl.ds(position, ROWS), head

        def take_turn():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        plgpu.copy_gmem_to_smem(q_ref.at[mine], q_buffer, q_full.at[group])
        own_first = vector(first_ref.at[row, pl.ds(position, ROWS)])
        plgpu.barrier_wait(q_full.at[group])
        maximum = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), _WGMMA.reduce(1))
        total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), _WGMMA.reduce(1))
        out = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), _WGMMA)

        def step_of(index, carry, masked):
            out, maximum, total = carry
            slot = lax.rem(index - begin, steps)
            plgpu.barrier_wait(k_full.at[slot])

            def score(acc):
                plgpu.wgmma(acc, q_buffer, keys.at[slot].transpose((1, 0)))
                take_turn()  # the other warpgroup's softmax ends; its products may queue behind these
                return acc[...]

            scores = pl.run_scoped(score, plgpu.ACC((ROWS, block)))
            plgpu.barrier_arrive(k_free.at[slot])
            if masked:
                scores = jnp.where(visible(position, own_first, index * block, block), scores, _MASKED)
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
        carry = by_parts(step_of, keys_seen(first_ref, row, position, block, begin, end), (out, maximum, total))
        out, maximum, total = carry
        pl.when(group == 0)(take_turn)
        q_buffer[...] = (out / lax.broadcast_in_dim(total, out.shape, [0])).astype(q.dtype)
        sums[...] = maximum + jnp.log(total) * math.log2(math.e)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_buffer, out_ref.at[mine])
        plgpu.copy_smem_to_gmem(sums, sums_ref.at[row, head, pl.ds(position, ROWS)])
        plgpu.wait_smem_to_gmem(0)

    def body(first_ref, q_ref, k_ref, v_ref, out_ref, sums_ref):
        row, head, start = place_of(rows, heads, length)
        where = row, head, start, *blocks_of_queries(first_ref, row, start, block)
        buffers = plgpu.SMEM((steps, block, head_dim), q.dtype, transforms=_SWIZZLED)

        @functools.partial(
            pl.run_scoped,
            q_buffer=plgpu.SMEM((2, ROWS, head_dim), q.dtype, transforms=_SWIZZLED),
            keys=buffers,
            values=buffers,
            sums=plgpu.SMEM((2, ROWS), jnp.float32),
            barriers=(plgpu.Barrier(num_barriers=steps),) * 2
            + (plgpu.Barrier(num_arrivals=2, num_barriers=steps),) * 2,
            q_full=plgpu.Barrier(num_barriers=2),
            turn=plgpu.Barrier(num_arrivals=2),
            collective_axes="wg",
        )
        def _(q_buffer, keys, values, sums, barriers, q_full, turn):
            loads = lax.axis_index("wg") == _LOADS
            pl.when(loads)(lambda: load(where, k_ref, v_ref, keys, values, barriers))
            refs = first_ref, q_ref, out_ref, sums_ref
            pl.when(jnp.logical_not(loads))(
                lambda: multiply(where, refs, q_buffer, keys, values, sums, barriers, q_full, turn)
            )

    out = q, jax.ShapeDtypeStruct((rows, heads, length), jnp.float32)
    return launch(body, out, rows * heads * (length // TILE), interpret)(first, q, k, v)


@functools.partial(jax.jit, static_argnames=("block", "steps", "interpret"))
def pull_queries(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, T, K, H]
    v: jax.Array,  # [B, T, K, H]
    first: jax.Array,  # [B, T] int32
    gradient: jax.Array,  # [B, T, N, H]
    sums: jax.Array,  # [B, N, T] float32
    products: jax.Array,  # [B, N, T] float32
    block: int = 64,
    steps: int = 2,
    interpret=None,
) -> jax.Array:
    """Return the gradient of the queries [B, T, N, H].

    Args:
      sums: what `attend` returned.
      products: of each query's output with its gradient.
      first, block, steps, interpret: as of `attend`.
    """
    rows, length, heads, head_dim = q.shape
    group_size = heads // k.shape[2]
    scale = head_dim**-0.5

    def load(where, k_ref, v_ref, keys, values, full, free):
        row, head, _, begin, end = where
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, end - begin)
        def _(step):
            slot = lax.rem(step, steps)

            @pl.when(step >= steps)
            def _():
                plgpu.barrier_wait(free.at[slot])

            window = row, pl.ds((begin + step) * block, block), lax.div(head, group_size)
            plgpu.copy_gmem_to_smem(k_ref.at[window], keys.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[window], values.at[slot], full.at[slot])

        drain(end - begin, steps, (free,))

    def multiply(where, refs, q_buffer, do_buffer, keys, values, full, free, own_full):
        row, head, start, begin, end = where
        first_ref, q_ref, do_ref, sums_ref, products_ref, out_ref = refs
        group = lax.axis_index("wg")
        plgpu.set_max_registers(232, action="increase")
        q_buffer, do_buffer, position = q_buffer.at[group], do_buffer.at[group], start + group * ROWS
        mine = row, pl.ds(position, ROWS), head
        plgpu.copy_gmem_to_smem(q_ref.at[mine], q_buffer, own_full.at[group])
        plgpu.copy_gmem_to_smem(do_ref.at[mine], do_buffer, own_full.at[group])
        own_first = vector(first_ref.at[row, pl.ds(position, ROWS)])
        own_sums, own_products = (vector(ref.at[row, head, pl.ds(position, ROWS)]) for ref in (sums_ref, products_ref))
        plgpu.barrier_wait(own_full.at[group])
        out = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), _WGMMA)

        def step_of(index, out, masked):
            slot = lax.rem(index - begin, steps)
            plgpu.barrier_wait(full.at[slot])
            scores, pull = two_products(
                (q_buffer, keys.at[slot].transpose((1, 0))), (do_buffer, values.at[slot].transpose((1, 0))), block
            )
            if masked:
                scores = jnp.where(visible(position, own_first, index * block, block), scores, _MASKED)
            weights = jnp.exp2(scores * (scale * math.log2(math.e)) - lax.broadcast_in_dim(own_sums, scores.shape, [0]))
            pull = weights * (pull - lax.broadcast_in_dim(own_products, pull.shape, [0]))
            out = add_product(out, pull.astype(q.dtype), keys.at[slot])
            plgpu.barrier_arrive(free.at[slot])
            return out

        out = by_parts(step_of, keys_seen(first_ref, row, position, block, begin, end), out)
        q_buffer[...] = (out * scale).astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_buffer, out_ref.at[mine])
        plgpu.wait_smem_to_gmem(0)

    def body(first_ref, q_ref, k_ref, v_ref, do_ref, sums_ref, products_ref, out_ref):
        row, head, start = place_of(rows, heads, length)
        where = row, head, start, *blocks_of_queries(first_ref, row, start, block)
        own = plgpu.SMEM((2, ROWS, head_dim), q.dtype, transforms=_SWIZZLED)
        buffers = plgpu.SMEM((steps, block, head_dim), q.dtype, transforms=_SWIZZLED)

        @functools.partial(
            pl.run_scoped,
            q_buffer=own,
            do_buffer=own,
            keys=buffers,
            values=buffers,
            full=plgpu.Barrier(num_arrivals=2, num_barriers=steps),
            free=plgpu.Barrier(num_arrivals=2, num_barriers=steps),
            own_full=plgpu.Barrier(num_arrivals=2, num_barriers=2),
            collective_axes="wg",
        )
        def _(q_buffer, do_buffer, keys, values, full, free, own_full):
            loads = lax.axis_index("wg") == _LOADS
            pl.when(loads)(lambda: load(where, k_ref, v_ref, keys, values, full, free))
            refs = first_ref, q_ref, do_ref, sums_ref, products_ref, out_ref
            pl.when(jnp.logical_not(loads))(
                lambda: multiply(where, refs, q_buffer, do_buffer, keys, values, full, free, own_full)
            )

    run = launch(body, q, rows * heads * (length // TILE), interpret)
    return run(first, q, k, v, gradient, sums, products)


@functools.partial(jax.jit, static_argnames=("block", "steps", "interpret"))
def pull_keys(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, T, K, H]
    v: jax.Array,  # [B, T, K, H]
    last: jax.Array,  # [B, T] int32
    gradient: jax.Array,  # [B, T, N, H]
    sums: jax.Array,  # [B, N, T] float32
    products: jax.Array,  # [B, N, T] float32
    block: int = 64,
    steps: int = 2,
    interpret=None,
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of the keys and of the values [B, T, K, H].

    Args:
      last: the last position of each position's document.
      block: queries looked at together.
      steps: blocks of queries in flight.
      sums, products, interpret: as of `pull_queries`.
    """
    rows, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group_size = heads // kv_heads
    scale = head_dim**-0.5

    def load(where, refs, buffers, full, free):
        row, kv_head, _, begin, end = where
        plgpu.set_max_registers(40, action="decrease")
        count = end - begin

        @pl.loop(0, group_size * count)
        def _(step):
            slot = lax.rem(step, steps)

            @pl.when(step >= steps)
            def _():
                plgpu.barrier_wait(free.at[slot])

            head = kv_head * group_size + lax.div(step, count)
            window = pl.ds((begin + lax.rem(step, count)) * block, block)
            q_ref, do_ref, sums_ref, products_ref = refs
            sources = (ref.at[row, window, head] for ref in (q_ref, do_ref))
            numbers = (ref.at[row, head, window] for ref in (sums_ref, products_ref))
            for source, buffer in zip((*sources, *numbers), buffers, strict=True):
                plgpu.copy_gmem_to_smem(source, buffer.at[slot], full.at[slot])

        drain(group_size * count, steps, (free,))

    def multiply(where, refs, k_buffer, v_buffer, buffers, full, free, own_full):
        row, kv_head, start, begin, end = where
        last_ref, k_ref, v_ref, dk_ref, dv_ref = refs
        queries, pulls, some_sums, some_products = buffers
        group = lax.axis_index("wg")
        plgpu.set_max_registers(232, action="increase")
        k_buffer, v_buffer, position = k_buffer.at[group], v_buffer.at[group], start + group * ROWS
        mine = row, pl.ds(position, ROWS), kv_head
        plgpu.copy_gmem_to_smem(k_ref.at[mine], k_buffer, own_full.at[group])
        plgpu.copy_gmem_to_smem(v_ref.at[mine], v_buffer, own_full.at[group])
        own_last = vector(last_ref.at[row, pl.ds(position, ROWS)])
        plgpu.barrier_wait(own_full.at[group])
        zeros = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), _WGMMA)

        def step_of(index, carry, masked, passed):
            dk, dv = carry
            slot = lax.rem(passed + index - begin, steps)
            plgpu.barrier_wait(full.at[slot])
            scores, pull = two_products(  # [keys, queries]
                (k_buffer, queries.at[slot].transpose((1, 0))), (v_buffer, pulls.at[slot].transpose((1, 0))), block
            )
            if masked:
                key, query = (plgpu.broadcasted_iota(jnp.int32, (ROWS, block), axis, layout=_WGMMA) for axis in (0, 1))
                query += index * block
                seen = query <= lax.broadcast_in_dim(own_last, (ROWS, block), [0])
                scores = jnp.where((query >= key + position) & seen, scores, _MASKED)

            def numbers(ref):
                return lax.broadcast_in_dim(plgpu.load(ref.at[slot], layout=_WGMMA.reduce(0)), (ROWS, block), [1])

            weights = jnp.exp2(scores * (scale * math.log2(math.e)) - numbers(some_sums))
            pull = weights * (pull - numbers(some_products))
            dv, dk = add_two_products(
                (dv, dk), (weights.astype(q.dtype), pulls.at[slot]), (pull.astype(q.dtype), queries.at[slot])
            )
            plgpu.barrier_arrive(free.at[slot])
            return dk, dv

        # Blocks of queries all of which see all of these keys.
        seen_from = lax.div(position + ROWS - 1 + block - 1, block)
        seen_to = lax.div(last_ref[row, position] + 1, block)
        seen_from = jnp.clip(seen_from, begin, end)
        parts = begin, seen_from, jnp.clip(seen_to, seen_from, end), end

        def head_of(index, carry):
            step = functools.partial(step_of, passed=index * (end - begin))
            return by_parts(step, parts, carry)

        dk, dv = lax.fori_loop(0, group_size, head_of, (zeros, zeros))
        k_buffer[...] = (dk * scale).astype(q.dtype)
        v_buffer[...] = dv.astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_buffer, dk_ref.at[mine])
        plgpu.copy_smem_to_gmem(v_buffer, dv_ref.at[mine])
        plgpu.wait_smem_to_gmem(0)

    def body(last_ref, q_ref, k_ref, v_ref, do_ref, sums_ref, products_ref, dk_ref, dv_ref):
        index = lax.axis_index("work")
        start = lax.div(index, rows * kv_heads) * TILE  # the first keys, which the most queries see, first
        index = lax.rem(index, rows * kv_heads)
        row, kv_head = lax.div(index, kv_heads), lax.rem(index, kv_heads)
        begin, end = lax.div(start, block), lax.div(last_ref[row, start + TILE - 1], block) + 1
        own = plgpu.SMEM((2, ROWS, head_dim), q.dtype, transforms=_SWIZZLED)
        tiles = plgpu.SMEM((steps, block, head_dim), q.dtype, transforms=_SWIZZLED)
        numbers = plgpu.SMEM((steps, block), jnp.float32)

        @functools.partial(
            pl.run_scoped,
            k_buffer=own,
            v_buffer=own,
            buffers=(tiles, tiles, numbers, numbers),
            full=plgpu.Barrier(num_arrivals=4, num_barriers=steps),
            free=plgpu.Barrier(num_arrivals=2, num_barriers=steps),
            own_full=plgpu.Barrier(num_arrivals=2, num_barriers=2),
            collective_axes="wg",
        )
        def _(k_buffer, v_buffer, buffers, full, free, own_full):
            where = row, kv_head, start, begin, end
            loads = lax.axis_index("wg") == _LOADS
            pl.when(loads)(lambda: load(where, (q_ref, do_ref, sums_ref, products_ref), buffers, full, free))
            refs = last_ref, k_ref, v_ref, dk_ref, dv_ref
            pl.when(jnp.logical_not(loads))(
                lambda: multiply(where, refs, k_buffer, v_buffer, buffers, full, free, own_full)
            )

    run = launch(body, (k, v), rows * kv_heads * (length // TILE), interpret)
    return run(last, q, k, v, gradient, sums, products)


def launch(body, out, programs, interpret):
    """Make a kernel of so many programs of three warpgroups, which writes arrays like `out`."""
    return plgpu.kernel(
        body,
        out_type=jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), out),
        grid=(programs,),
        grid_names=("work",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({} if interpret is None else {"interpret": interpret}),
    )


def place_of(rows, heads, length):
    """Return row, head and first position of a program's tile of queries; those that see the most keys come first."""
    index = lax.axis_index("work")
    start = (length // TILE - 1 - lax.div(index, rows * heads)) * TILE
    index = lax.rem(index, rows * heads)
    return lax.div(index, heads), lax.rem(index, heads), start


def blocks_of_queries(first_ref, row, start, block):
    """Return the first block of keys that a tile of queries sees, and the one behind the last."""
    return lax.div(first_ref[row, start], block), lax.div(start + TILE - 1, block) + 1


def keys_seen(first_ref, row, position, block, begin, end):
    """Return where those blocks begin of which the queries from `position` on see each key, and where they end."""
    seen_from = lax.div(first_ref[row, position + ROWS - 1] + block - 1, block)
    seen_from = jnp.clip(seen_from, begin, end)
    return begin, seen_from, jnp.clip(lax.div(position + 1, block), seen_from, end), end


def by_parts(step, parts, carry):
    """Go through blocks that are masked, that are not, and that are again."""
    for begin, end, masked in zip(parts[:-1], parts[1:], (True, False, True), strict=True):
        carry = lax.fori_loop(begin, end, functools.partial(step, masked=masked), carry)
    return carry


def visible(position, own_first, start, block):
    """Tell which keys [block] from `start` on the queries from `position` on see."""
    query, key = (plgpu.broadcasted_iota(jnp.int32, (ROWS, block), axis, layout=_WGMMA) for axis in (0, 1))
    key += start
    return (query + position >= key) & (key >= lax.broadcast_in_dim(own_first, (ROWS, block), [0]))


def vector(ref):
    """Read a number for each row of a warpgroup's tile from global memory."""
    return plgpu.load(ref, layout=_WGMMA.reduce(1), optimized=False)


def drain(count, steps, barriers):
    """Wait until the last blocks are done with: no barrier is left half used."""

    @pl.loop(jnp.maximum(count - steps, 0), count)
    def _(step):
        for barrier in barriers:
            plgpu.barrier_wait(barrier.at[lax.rem(step, steps)])


def add_product(total, a, b):
    """Return total [ROWS, m] + a [ROWS, n] x b [n, m]; a function because no interpreter knows it."""
    return pl.run_state(lambda sums: plgpu.wgmma(sums, a, b))(plgpu.ACC.init(total))


def two_products(first, second, columns):
    """Return two products [ROWS, n] x [n, columns] of shared memory, computed side by side."""

    def multiply(one, other):
        plgpu.wgmma(one, *first)
        plgpu.wgmma(other, *second)
        return one[...], other[...]

    return pl.run_scoped(multiply, plgpu.ACC((ROWS, columns)), plgpu.ACC((ROWS, columns)))


def add_two_products(totals, first, second):
    """Add two products to two totals as `add_product` does, side by side."""

    def multiply(sums):
        plgpu.wgmma(sums[0], *first)
        plgpu.wgmma(sums[1], *second)

    return pl.run_state(multiply)(tuple(plgpu.ACC.init(total) for total in totals))
