"""The "batched" backend of the grouped expert MLP: for many tokens, and for training with them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ernie_jax.ops.blocks import sort_pairs, sum_of_blocks
from ernie_jax.ops.precision import einsum, swiglu

_ROOM = 1.25  # for each expert, of the pairs that it would have if all had as many
_MULTIPLE = 8


def by_batches(x, chosen, weights, gate_up, down, first_expert, total=None):
    """Give each expert room for somewhat more pairs than the mean and multiply all at once; "blocks" takes the rest.

    Most pairs go through products with the stacked weights where they lie, and so does their gradient: the weights'
    is one product with the rows of each expert. Rows move by gathers both ways, never by sums of unknown order.

    Args:
      total: experts over all shards; None: those that are here.
    """
    tokens, k = chosen.shape
    experts = gate_up.shape[0]
    room = -(-int(tokens * k * _ROOM) // ((total or experts) * _MULTIPLE)) * _MULTIPLE
    expert, sizes, _, rank = sort_pairs(chosen - first_expert, experts)
    before = jnp.append(jnp.cumsum(sizes) - sizes, 0)  # of an expert's pairs, as sorted
    within = rank - before[expert]
    fits = (expert < experts) & (within < room)
    place = jnp.where(fits, expert * room + within, experts * room).reshape(tokens, k)  # row of each pair
    pair = jnp.full(experts * room, tokens * k).at[place.reshape(-1)].set(jnp.arange(tokens * k), mode="drop")

    rows = _spread(x, pair, place).reshape(experts, room, -1)
    hidden = swiglu(einsum("ecd,exfd->ecxf", rows, gate_up), axis=2)
    out = einsum("ecf,edf->ecd", hidden, down).reshape(experts * room, -1)
    most = _collect(out, weights, pair, place)
    left = jnp.where(fits.reshape(tokens, k), -1, chosen - first_expert)
    return (most + sum_of_blocks(x, left, weights, gate_up, down, 0)).astype(x.dtype)


@jax.custom_vjp
def _spread(x, pair, place):
    """Return rows [R, D]: x [T, D] of the tokens of their pairs, zero where there is none."""
    return x.at[pair // place.shape[1]].get(mode="fill", fill_value=0)


def _spread_back(residuals, gradient):
    (place,) = residuals
    return _taken(gradient, place).sum(1).astype(gradient.dtype), None, None


_spread.defvjp(lambda x, pair, place: (_spread(x, pair, place), (place,)), _spread_back)


@jax.custom_vjp
def _collect(out, weights, pair, place):
    """Return the weighted sum [T, D] float32 of rows [R, D] at the places [T, k] of a token's pairs."""
    return jnp.einsum("tkd,tk->td", _taken(out, place), weights.astype(jnp.float32))


def _collect_back(residuals, gradient):
    out, weights, pair, place = residuals
    of_weights = jnp.einsum("tkd,td->tk", _taken(out, place), gradient)
    scale = weights.reshape(-1).at[pair].get(mode="fill", fill_value=0).astype(jnp.float32)
    rows = gradient.at[pair // place.shape[1]].get(mode="fill", fill_value=0)
    return (rows * scale[:, None]).astype(out.dtype), of_weights.astype(weights.dtype), None, None


_collect.defvjp(lambda *inputs: (_collect(*inputs), inputs), _collect_back)


def _taken(rows, place):  # [R, D], [T, k] -> [T, k, D] float32
    return rows.at[place].get(mode="fill", fill_value=0).astype(jnp.float32)
