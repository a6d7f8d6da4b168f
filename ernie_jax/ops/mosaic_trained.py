"""The "mosaic" backend of the grouped expert MLP, with its gradient."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ernie_jax.errors import UserError
from ernie_jax.ops.adapted import Adapted
from ernie_jax.ops.blocks import sort_pairs, taken
from ernie_jax.ops.kept import KEPT
from ernie_jax.ops.mosaic import by_mosaic, check_experts, mosaic_problem
from ernie_jax.ops.precision import swiglu
from ernie_jax.ops.quantized import form_of

TILING = 64, 256, "rows", 4, 12  # of `mosaic_kernel`; measured for prompts by benchmarks/prefill_ops.py
_BLOCK = 128  # its rows
_THIN_TILING = 64, 64, "rows", 4, 12  # of a product with a first part of an adapter
_RANK = 64  # an adapter's is filled up to a multiple
_STEP = 64  # of `mosaic_gradient`: an expert's rows begin at a multiple


def trained_experts_problem(backend: str, width: int, inner: int, dtype: jnp.dtype | str) -> str | None:
    """Say what a backend does not take of training: D, F, the weights' dtype; None if nothing."""
    if backend != "mosaic":
        return None
    if isinstance(dtype, str) or form_of(dtype):
        return "learns beside bfloat16 weights only"
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


def by_mosaic_trained(x, chosen, weights, gate_up, down, first_expert, shared=None, live=None, addends=()):
    """Do as `by_mosaic` does; bfloat16 weights without addends have a gradient, and may have adapters.

    Raises:
      UserError: if the sizes, the dtype or the GPU are not what it takes.
    """
    if shared is None and not addends and not form_of(gate_up.dtype):
        return _learnable(x, chosen, weights, gate_up, down, jnp.asarray(first_expert, jnp.int32), live)
    if _adapted(gate_up, down):
        raise UserError("expert backend mosaic takes adapters where it trains only; use expert backend batched")
    return by_mosaic(x, chosen, weights, gate_up, down, first_expert, shared, live, addends)


def _adapted(*weights):
    return any(isinstance(weight, Adapted) for weight in weights)


@jax.custom_vjp
def _learnable(x, chosen, weights, gate_up, down, first_expert, live):
    if _adapted(gate_up, down):
        return _multiply_local(x, chosen, weights, gate_up, down, first_expert, live)[0]
    return by_mosaic(x, chosen, weights, gate_up, down, first_expert, live=live)


def _multiply_local(x, chosen, weights, gate_up, down, first, live):
    check_experts(x, gate_up, down)
    chosen = chosen - first
    if live is not None:
        chosen = jnp.where(jnp.arange(len(x))[:, None] < live, chosen, -1)
    return multiply(x, chosen, weights, gate_up, down)


def _forward(*given):
    out, residuals = _multiply_local(*jax.tree.map(lambda one: one.value, given))
    return out, (residuals, [() if one.perturbed else None for one in jax.tree.leaves(given[3:5])])


def _backward(residuals, gradient):
    """Weights that nobody asks the gradient of, as frozen ones are, get none."""
    residuals, learns = residuals
    _, _, *experts = residuals[:4]
    learns = jax.tree.unflatten(jax.tree.structure(experts), [one is not None for one in learns])
    of_x, of_weights, *of_experts = pull(residuals, gradient, *learns)
    return of_x, None, of_weights, *of_experts, None, None


_learnable.defvjp(_forward, _backward, symbolic_zeros=True)


def multiply(x, chosen, weights, gate_up, down):
    """Return the weighted sum [T, D] in the dtype of `x`, and what `pull` takes; `chosen` counts from the first expert.

    Weights are read where they lie, in either direction. Each expert's result is rounded to the dtype of `x` before the
    weighted sum, which is float32.
    """
    at = _kept(_arrange(chosen, down.shape[0]))
    rows = x.at[at.pair // chosen.shape[1]].get(mode="fill", fill_value=0)
    hidden, low_rows = _kept(_product(rows, gate_up, at))
    out, low_gated = _product(_gated(hidden), down, at)
    columns = weights.astype(jnp.float32).T
    y = sum(row * weight[:, None] for row, weight in zip(taken(out, at.place), columns, strict=True))
    return y.astype(x.dtype), (x, weights, gate_up, down, at, hidden, low_rows, _kept(low_gated))


def pull(residuals, gradient, learns_gate_up, learns_down):
    """Return the gradients of x, the routers' weights, gate_up and down; None of what does not learn.

    Args:
      learns_gate_up, learns_down: whether a weight learns, of one with an adapter whether each part of it does.
    """
    x, weights, gate_up, down, at, hidden, low_rows, low_gated = residuals
    real = (at.pair < at.place.size)[:, None]
    token = at.pair // at.place.shape[1]

    def masked(rows):
        """Put zeros in rows of no pair, which hold whatever was in memory."""
        return jax.tree.map(lambda rows: jnp.where(real, rows, 0).astype(x.dtype), rows)

    pulls = gradient.at[token].get(mode="fill", fill_value=0)
    # Without the weight: its own gradient is the product with what is weighted, of which this is the other side.
    of_hidden, low_pulls = _product(pulls, down, at, turned=True)
    of_hidden = of_hidden.astype(jnp.float32)
    scale = weights.reshape(-1).at[at.pair].get(mode="fill", fill_value=0).astype(jnp.float32)[:, None]
    gated, back = jax.vjp(lambda hidden: _gated(hidden).astype(jnp.float32), hidden)
    of_weights = jnp.sum(jnp.where(real, gated * of_hidden, 0), axis=1)
    of_gate_up = masked(*back(of_hidden * scale))
    of_rows, low_of_gate_up = _product(of_gate_up, gate_up, at, turned=True)
    of_x = sum(taken(of_rows, at.place)).astype(x.dtype)
    of_weights = of_weights.at[at.place].get(mode="fill", fill_value=0).astype(weights.dtype)

    rows = x.at[token].get(mode="fill", fill_value=0)
    gated, low_gated = masked(jax.tree.map(lambda side: side * scale, (gated, low_gated)))
    low = masked((low_of_gate_up, low_rows))
    of_gate_up = _of_weight(learns_gate_up, gate_up, at, of_gate_up, rows, *low)
    of_down = _of_weight(learns_down, down, at, pulls, gated, masked(low_pulls), low_gated)
    return of_x, of_weights, of_gate_up, of_down


def _of_weight(learns, weight, at, pulls, rows, low_pulls, low_rows):
    """Return a weight's gradient; `low_pulls` and `low_rows` are between the parts of its adapter."""
    from ernie_jax.ops.mosaic_gradient import grouped_outer_product

    if not isinstance(weight, Adapted):
        return grouped_outer_product(pulls, rows, at.groups).reshape(weight.shape) if learns else None
    of_base = _of_weight(learns.weight, weight.weight, at, pulls, rows, None, None)
    of_down = of_up = None
    rank = weight.up.shape[-1]
    if learns.down:
        of_down = grouped_outer_product(rows, low_pulls, at.groups)[..., :rank].swapaxes(1, 2)
    if learns.up:
        of_up = grouped_outer_product(pulls, low_rows, at.groups)[..., :rank].reshape(weight.up.shape)
    return Adapted(of_base, of_down, of_up)


def _kept(values):
    return jax.tree.map(lambda array: checkpoint_name(array, KEPT.experts), values)


def _gated(hidden):
    return swiglu(hidden.reshape(len(hidden), 2, -1), axis=1)


def _product(rows, weight, at, turned=False):
    """Multiply rows by a weight [E, *out, in], or turned [E, *in, out].

    Returns:
      The product, adapter included, rounded once; and the rows between the parts of the adapter, None without one.
    """
    from ernie_jax.ops import mosaic_kernel  # Mosaic GPU, for Hopper GPUs only

    def product(rows, weight, tiling, adapter=None):
        tiling = mosaic_kernel.Tiling(*tiling)
        return mosaic_kernel.grouped_product(
            rows, weight[:, None], at.blocks, at.live, tiling, turned=turned, adapter=adapter
        )

    if not isinstance(weight, Adapted):
        return product(rows, _matrices(weight), TILING), None
    more = -weight.up.shape[-1] % _RANK
    down = jnp.pad(weight.down, ((0, 0), (0, more), (0, 0)))
    up = jnp.pad(_matrices(weight.up), ((0, 0), (0, 0), (0, more)))
    first, second = (up, down) if turned else (down, up)
    low = product(rows, first, _THIN_TILING)
    return product(rows, _matrices(weight.weight), TILING, (low, second[:, None])), low


def _matrices(weight):
    return weight.reshape(weight.shape[0], -1, weight.shape[-1])


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
