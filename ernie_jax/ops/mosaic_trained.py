"""The "mosaic" backend of the grouped expert MLP, with its gradient."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ernie_jax.ops.blocks import sort_pairs, taken
from ernie_jax.ops.kept import KEPT
from ernie_jax.ops.mosaic import MOST_ALONG, by_mosaic, check_experts, mosaic_problem
from ernie_jax.ops.precision import swiglu
from ernie_jax.ops.quantized import form_of

TILING = 64, 256, "rows", 4, 12  # of `mosaic_kernel`; measured for prompts by benchmarks/prefill_ops.py
_BLOCK = 128  # its rows
_STEP = 64  # of `mosaic_gradient`: an expert's rows begin at a multiple


def trained_experts_problem(
    backend: str, tokens: int, width: int, inner: int, dtype: jnp.dtype | str, adapted: bool
) -> str | None:
    """Say what a backend does not take of training: tokens, D, F, the weights' dtype, adapters; None if nothing."""
    if backend != "mosaic":
        return None
    if adapted:
        return "takes no adapters of routed experts"
    if isinstance(dtype, str) or form_of(dtype):
        return "learns beside bfloat16 weights only"
    if tokens <= MOST_ALONG:
        return f"takes more than {MOST_ALONG} tokens a device, not {tokens}"
    return mosaic_problem(width, inner, dtype)


class Arrangement(NamedTuple):
    """Where each pair of a token and an expert stands among rows that are sorted by expert.

    Attributes:
      pair: [M] of each row; T * k of none.
      place: [T, k] row of each pair; M or more of those without a local expert.
      blocks, live: what `mosaic_kernel.grouped_product` takes.
      groups: what `mosaic_gradient.grouped_outer_product` takes.
    """

    pair: jax.Array
    place: jax.Array
    blocks: jax.Array
    live: jax.Array
    groups: jax.Array


def by_mosaic_trained(x, chosen, weights, gate_up, down, first_expert, shared=None, live=None):
    """Do as `by_mosaic` does; bfloat16 weights without shared experts have a gradient."""
    if shared is not None or form_of(gate_up.dtype):
        return by_mosaic(x, chosen, weights, gate_up, down, first_expert, shared, live)
    return _learnable(x, chosen, weights, gate_up, down, jnp.asarray(first_expert, jnp.int32), live)


@jax.custom_vjp
def _learnable(x, chosen, weights, gate_up, down, first_expert, live):
    return by_mosaic(x, chosen, weights, gate_up, down, first_expert, live=live)


def _forward(*given):
    x, chosen, weights, gate_up, down, first, *live = (one.value for one in given if one is not None)
    check_experts(x, gate_up, down)
    chosen = chosen - first
    if live:
        chosen = jnp.where(jnp.arange(len(x))[:, None] < live[0], chosen, -1)
    out, residuals = multiply(x, chosen, weights, gate_up, down)
    return out, (residuals, [() if one.perturbed else None for one in given[3:5]])


def _backward(residuals, gradient):
    """Weights that nobody asks the gradient of, as frozen ones are, get none."""
    residuals, learns = residuals
    of_x, of_weights, *of_experts = pull(residuals, gradient, *(one is not None for one in learns))
    return of_x, None, of_weights, *of_experts, None, None


_learnable.defvjp(_forward, _backward, symbolic_zeros=True)


def multiply(x, chosen, weights, gate_up, down):
    """Return the weighted sum [T, D] in the dtype of `x`, and what `pull` takes; `chosen` counts from the first expert.

    Weights are read where they lie, in either direction. Each expert's result is rounded to the dtype of `x` before the
    weighted sum, which is float32.
    """
    tokens, k = chosen.shape
    at = jax.tree.map(lambda array: checkpoint_name(array, KEPT.experts), _arrange(chosen, len(down)))
    rows = x.at[at.pair // k].get(mode="fill", fill_value=0)
    hidden = checkpoint_name(_product(rows, _matrix(gate_up), at), KEPT.experts)
    out = _product(_gated(hidden), down, at)
    columns = weights.astype(jnp.float32).T
    y = sum(row * weight[:, None] for row, weight in zip(taken(out, at.place), columns, strict=True))
    return y.astype(x.dtype), (x, weights, gate_up, down, at, hidden)


def pull(residuals, gradient, learns_gate_up: bool, learns_down: bool):
    """Return the gradients of x, the routers' weights, gate_up and down; None of weights that do not learn."""
    x, weights, gate_up, down, at, hidden = residuals
    k = at.place.shape[1]
    real = at.pair < at.place.size
    token = at.pair // k
    pulls = gradient.at[token].get(mode="fill", fill_value=0)
    # Without the weight: its own gradient is the product with what is weighted, of which this is the other side.
    of_hidden = _product(pulls, down, at, turned=True).astype(jnp.float32)
    scale = weights.reshape(-1).at[at.pair].get(mode="fill", fill_value=0).astype(jnp.float32)[:, None]
    gated, back = jax.vjp(lambda hidden: _gated(hidden).astype(jnp.float32), hidden)
    of_weights = jnp.sum(jnp.where(real[:, None], gated * of_hidden, 0), axis=1)
    # Rows of no pair hold whatever was in memory.
    (of_gate_up,) = back(of_hidden * scale)
    of_gate_up = jnp.where(real[:, None], of_gate_up, 0)
    of_x = sum(taken(_product(of_gate_up, _matrix(gate_up), at, turned=True), at.place)).astype(x.dtype)
    of_weights = of_weights.at[at.place].get(mode="fill", fill_value=0).astype(weights.dtype)
    gradients = [None, None]
    if learns_gate_up or learns_down:
        from ernie_jax.ops.mosaic_gradient import grouped_outer_product

        if learns_gate_up:
            rows = x.at[token].get(mode="fill", fill_value=0)
            gradients[0] = grouped_outer_product(of_gate_up, rows, at.groups).reshape(gate_up.shape)
        if learns_down:
            gated = jnp.where(real[:, None], gated * scale, 0).astype(x.dtype)
            gradients[1] = grouped_outer_product(pulls, gated, at.groups)
    return of_x, of_weights, *gradients


def _matrix(gate_up):
    experts, _, inner, width = gate_up.shape
    return gate_up.reshape(experts, 2 * inner, width)


def _gated(hidden):
    return swiglu(hidden.reshape(len(hidden), 2, -1), axis=1)


def _product(rows, weight, at, turned=False):
    from ernie_jax.ops import mosaic_kernel  # Mosaic GPU, for Hopper GPUs only

    tiling = mosaic_kernel.Tiling(*TILING)
    return mosaic_kernel.grouped_product(rows, weight[:, None], at.blocks, at.live, tiling, turned=turned)


def _arrange(chosen, experts):
    tokens, k = chosen.shape
    pairs = tokens * k
    expert, sizes, _, rank = sort_pairs(chosen, experts)
    steps = -(-sizes // _STEP)
    starts = (jnp.cumsum(steps) - steps) * _STEP
    shift = starts - (jnp.cumsum(sizes) - sizes)
    rows = (pairs // _STEP + min(pairs, experts)) * _STEP + _BLOCK  # the last block reads so far
    local = expert < experts
    index = jnp.arange(pairs)
    place = jnp.where(local, rank + jnp.append(shift, 0)[expert], rows + index)
    pair = jnp.full(rows, pairs).at[place].set(index, mode="drop", unique_indices=True)

    count = -(-sizes // _BLOCK)
    ends = jnp.cumsum(count)
    index = jnp.arange(min(pairs, pairs // _BLOCK + experts))
    mine = jnp.minimum((ends <= index[:, None]).sum(1), experts - 1)
    before = (index - (ends - count)[mine]) * _BLOCK  # rows of its expert in front of a block
    blocks = jnp.stack([mine, starts[mine] + before, jnp.clip(sizes[mine] - before, 0, _BLOCK)], axis=1)
    groups = jnp.stack([starts // _STEP, steps], axis=1)
    numbers = (array.astype(jnp.int32) for array in (blocks, ends[-1:], groups))
    return Arrangement(pair, place.reshape(tokens, k), *numbers)
