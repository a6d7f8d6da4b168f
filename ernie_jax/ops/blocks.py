"""The "blocks" backend of the grouped expert MLP: pairs sorted by expert, in blocks of one expert each."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ernie_jax.ops.precision import einsum, swiglu

_BLOCK_ROWS = 128
_SLAB = 16  # blocks multiplied at a time: enough work to hide a GPU's round trip to the host, few copies of weights


def by_blocks(x, chosen, weights, gate_up, down, first_expert):
    """Sort (token, expert) pairs by expert into blocks of one expert each, and multiply a slab of blocks at a time.

    There is room for the worst case, all pairs local and each expert's last block nearly empty; the loop ends with the
    last block in use, so work and copied weights follow the pairs that are really there. (`jax.lax.ragged_dot` is a
    dense expansion on CPUs, on most TPUs and, up to JAX 0.11 at least, on GPUs.)

    A loop of unknown length has no automatic gradient; `_multiply` brings its own.
    """
    return sum_of_blocks(x, chosen, weights, gate_up, down, first_expert, jnp.float32).astype(x.dtype)


def sum_of_blocks(x, chosen, weights, gate_up, down, first_expert, dtype):
    """Return what `by_blocks` does in float32, of experts' results that are kept in a dtype until they are summed."""
    tokens, k = chosen.shape
    experts, pairs = gate_up.shape[0], tokens * k
    expert, sizes, _, rank = sort_pairs(chosen - first_expert, experts)
    blocks = (sizes + _BLOCK_ROWS - 1) // _BLOCK_ROWS
    # In front of an expert's rows are those of the experts before it, each with its last block filled up.
    ends = jnp.cumsum(blocks)
    shift = (ends - blocks) * _BLOCK_ROWS - (jnp.cumsum(sizes) - sizes)

    most = min(pairs, pairs // _BLOCK_ROWS + experts)
    slab = min(_SLAB, most)
    slabs = -(-most // slab)
    rows = slabs * slab * _BLOCK_ROWS
    place = jnp.where(expert < experts, rank + jnp.append(shift, 0)[expert], rows)  # row of each pair
    pair = jnp.full(rows, pairs).at[place].set(jnp.arange(pairs), mode="drop")  # of each row
    of_block = jnp.minimum(jnp.searchsorted(ends, jnp.arange(slabs * slab), side="right"), experts - 1)
    token, of_block = (pair // k).reshape(slabs, slab, _BLOCK_ROWS), of_block.reshape(slabs, slab)
    out = _multiply(dtype, x, gate_up, down, token, of_block, (ends[-1] + slab - 1) // slab)
    return collect(out, weights, pair, place.reshape(tokens, k))


def sort_pairs(chosen: jax.Array, experts: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Sort the pairs of a token and one of its experts by expert, those without a local expert last.

    Args:
      chosen: [T, k] int32, of which 0 to experts - 1 are local.

    Returns:
      expert [T * k] of each pair, `experts` where it is not local; sizes [experts], how many pairs each has; order
      [T * k], the pairs as sorted; rank [T * k], where each pair is among those.
    """
    expert = jnp.where((chosen >= 0) & (chosen < experts), chosen, experts).reshape(-1)
    order = jnp.argsort(expert)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype), unique_indices=True)
    return expert, jnp.bincount(expert, length=experts + 1)[:-1], order, rank


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(dtype, x, gate_up, down, token, of_block, live):
    """Multiply rows of x [T, D], given by token [slabs, slab, rows], by their block's expert: [all rows, D].

    Rows of token T are zero. The slabs from `live` on are not computed and come back zero.
    """

    def step(index, out):
        rows = x.at[token[index]].get(mode="fill", fill_value=0)
        y = _slab(rows, *jax.tree.map(lambda leaf: leaf[of_block[index]], (gate_up, down)))
        return jax.lax.dynamic_update_index_in_dim(out, y.astype(dtype), index, 0)

    out = jnp.zeros((*token.shape, x.shape[1]), dtype)
    return jax.lax.fori_loop(0, live, step, out).reshape(-1, x.shape[1])


def _slab(rows, gate_up, down):  # [N, rows, D], [N, 2, F, D], [N, D, F] -> [N, rows, D]
    hidden = swiglu(einsum("nbd,nxfd->nbxf", rows, gate_up), axis=2)
    return einsum("nbf,ndf->nbd", hidden, down, jnp.float32)


def _forward(dtype, *primals):
    x, gate_up, down, token, of_block, live = values = jax.tree.map(lambda primal: primal.value, primals)
    wanted = [() if leaf.perturbed else None for leaf in jax.tree.leaves((primals[1], primals[2]))]
    return _multiply(dtype, *values), (x, gate_up, down, token, of_block, live, wanted)


def _backward(dtype, residuals, gradient):
    """Repeat each slab and pull its gradient back; sums over slabs are float32 and rounded once.

    Weights that nobody asks the gradient of, as frozen ones are, get none.
    """
    x, gate_up, down, token, of_block, live, wanted = residuals
    gradient = gradient.reshape(*token.shape, -1)
    leaves, structure = jax.tree.flatten((gate_up, down))
    learnt = [index for index, mark in enumerate(wanted) if mark is not None]

    def step(index, sums):
        block = of_block[index]
        rows = x.at[token[index]].get(mode="fill", fill_value=0)

        def slab(rows, *those):
            mine = [leaf[block] for leaf in leaves]
            for index, leaf in zip(learnt, those, strict=True):
                mine[index] = leaf
            return _slab(rows, *jax.tree.unflatten(structure, mine))

        _, pull = jax.vjp(slab, rows, *(leaves[index][block] for index in learnt))
        parts = pull(gradient[index].astype(jnp.float32))
        places = token[index], *[block] * len(learnt)
        return [
            total.at[place].add(part.astype(jnp.float32), mode="drop")
            for total, place, part in zip(sums, places, parts, strict=True)
        ]

    inputs = [x, *(leaves[index] for index in learnt)]
    sums = jax.lax.fori_loop(0, live, step, [jnp.zeros(array.shape, jnp.float32) for array in inputs])
    of_x, *rest = [total.astype(array.dtype) for total, array in zip(sums, inputs, strict=True)]
    gradients = [None] * len(leaves)
    for index, total in zip(learnt, rest, strict=True):
        gradients[index] = total
    return of_x, *jax.tree.unflatten(structure, gradients), None, None, None


_multiply.defvjp(_forward, _backward, symbolic_zeros=True)


@jax.custom_vjp
def collect(out: jax.Array, weights: jax.Array, pair: jax.Array, place: jax.Array) -> jax.Array:
    """Return the weighted sum [T, D] float32 of rows [R, D] at the places [T, k] of a token's pairs.

    Args:
      pair: [R] which pair of a token and a choice each row is of; T * k of none.
    """
    return sum(row * weight[:, None] for row, weight in zip(taken(out, place), _columns(weights), strict=True))


def _collect_back(residuals, gradient):
    out, weights, pair, place = residuals
    of_weights = jnp.stack([(row * gradient).sum(1) for row in taken(out, place)], axis=1)
    scale = weights.reshape(-1).at[pair].get(mode="fill", fill_value=0).astype(jnp.float32)
    rows = gradient.at[pair // place.shape[1]].get(mode="fill", fill_value=0)
    return (rows * scale[:, None]).astype(out.dtype), of_weights.astype(weights.dtype), None, None


collect.defvjp(lambda *inputs: (collect(*inputs), inputs), _collect_back)


def taken(rows: jax.Array, place: jax.Array) -> list[jax.Array]:
    """Return for each of k choices the rows [T, D] float32 at its places: all together would have to be written."""
    return [rows.at[at].get(mode="fill", fill_value=0).astype(jnp.float32) for at in place.T]


def _columns(weights):
    return weights.astype(jnp.float32).T
