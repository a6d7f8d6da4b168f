"""The "batched" backend of the grouped expert MLP: for many tokens, and for training with them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ernie_jax.ops.adapted import Adapted
from ernie_jax.ops.blocks import collect, sort_pairs, sum_of_blocks, taken
from ernie_jax.ops.precision import einsum, precision_of, swiglu
from ernie_jax.ops.quantized import Quantized

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
    hidden = swiglu(_product("ecd,exfd->ecxf", rows, gate_up), axis=2)
    out = _product("ecf,edf->ecd", hidden, down).reshape(experts * room, -1)
    most = collect(out, weights, pair, place)
    left = jnp.where(fits.reshape(tokens, k), -1, chosen - first_expert)
    return (most + sum_of_blocks(x, left, weights, gate_up, down, 0, x.dtype)).astype(x.dtype)


def _product(subscripts, x, y):
    """Contract as `einsum` does, but let the product itself round its sums: of so many rows none is in parts."""
    if isinstance(y, Adapted):
        first, second = y.low_rank(subscripts)
        return _product(subscripts, x, y.weight) + _product(second, _product(first, x, y.down), y.up)
    if isinstance(y, Quantized):
        return einsum(subscripts, x, y)
    return jnp.einsum(subscripts, x, y, precision=precision_of(x, y), preferred_element_type=x.dtype)


@jax.custom_vjp
def _spread(x, pair, place):
    """Return rows [R, D]: x [T, D] of the tokens of their pairs, zero where there is none."""
    return x.at[pair // place.shape[1]].get(mode="fill", fill_value=0)


def _spread_back(residuals, gradient):
    (place,) = residuals
    return sum(taken(gradient, place)).astype(gradient.dtype), None, None


_spread.defvjp(lambda x, pair, place: (_spread(x, pair, place), (place,)), _spread_back)
