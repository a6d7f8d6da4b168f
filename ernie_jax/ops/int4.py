"""Products with int4 weights: a kernel for TPUs, which unpacks in its own memory, and two contractions elsewhere."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ernie_jax.ops.quantized import Quantized

_LANES = 128
_COLUMNS = 512  # outputs that a step of the kernel unpacks
_ROWS_BYTES = 3 << 20  # of x in a step


def int4_einsum(subscripts: str, x: jax.Array, weight: Quantized, out_dtype: jnp.dtype) -> jax.Array:
    """Contract the last axes of x and of a weight [*out, in], accumulating in float32 and rounding once.

    Args:
      subscripts: the weight has at most three outputs; x may share the first, which is in the result then.
    """
    inputs, output = subscripts.split("->")
    left, right = inputs.split(",")
    *first, last, _ = right
    first, between = first[:1], first[1:]
    sizes = dict(zip(left, x.shape, strict=True)) | dict(zip(right, weight.shape, strict=True))
    shared = [label for label in right[:-1] if label in left]
    rows = [label for label in left[:-1] if label not in shared]
    x = x.transpose([left.index(label) for label in (*shared, *rows, left[-1])])
    x = x.reshape(math.prod(sizes[label] for label in shared), -1, x.shape[-1])
    shape = [math.prod(sizes[label] for label in labels) for labels in (first, between, last)]
    matrices = jax.tree.map(lambda array: array.reshape(*shape, array.shape[-1]), weight)
    out = _product(x, matrices, out_dtype)
    found = [*first, *between, *rows, *last]
    return out.reshape([sizes[label] for label in found]).transpose([found.index(label) for label in output])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, weight: Quantized, out_dtype: jnp.dtype) -> jax.Array:
    """Contract the last axes of x [B or 1, T, K] and of a weight [B, C, N, K]: [B, C, T, N].

    The weight has no gradient; that of x is the contractions', for the kernel has none.
    """
    if weight.group != _LANES:
        return by_contractions(x, weight, out_dtype)
    ways = {"tpu": by_kernel, "default": by_contractions}
    return jax.lax.platform_dependent(
        x, weight, **{name: functools.partial(way, out_dtype=out_dtype) for name, way in ways.items()}
    )


def _forward(x, weight, out_dtype):
    return _product(x, weight, out_dtype), (x, weight)


def _backward(out_dtype, residuals, gradient):
    x, weight = residuals
    _, pull = jax.vjp(lambda x: by_contractions(x, weight, out_dtype), x)
    return *pull(gradient), None


_product.defvjp(_forward, _backward)


def by_contractions(x: jax.Array, weight: Quantized, out_dtype: jnp.dtype) -> jax.Array:
    """Contract the inputs of the low and of the high four bits each; a compiler may write these operands out."""
    half = weight.group // 2
    low, high = jnp.moveaxis(x.reshape(*x.shape[:-1], -1, 2, half), -2, 0).reshape(2, *x.shape[:-1], -1)
    scales = jnp.repeat(weight.scales.astype(jnp.float32), half, axis=-1)
    labels = "tk,bcnk->bctn" if len(x) == 1 else "btk,bcnk->bctn"

    def product(part, steps):
        operand = ((steps - 8).astype(jnp.float32) * scales).astype(x.dtype)
        part = part[0] if len(x) == 1 else part
        return jnp.einsum(labels, part, operand, precision=_precision(x), preferred_element_type=jnp.float32)

    values = weight.values.astype(jnp.int32)
    return (product(low, values & 15) + product(high, values >> 4)).astype(out_dtype)


def by_kernel(x: jax.Array, weight: Quantized, out_dtype: jnp.dtype, interpret: bool = False) -> jax.Array:
    """Unpack a tile of weights at a time to whole numbers, and scale what comes of each group.

    A tile of 128 bytes has two groups: x is laid out in rows of which each has the inputs of one group, and zeros for
    the other, so that one product gives a sum for each.
    """
    (_, tokens, inner), (batch, count, outputs, _) = x.shape, weight.shape
    groups, half = weight.scales.shape[-1], weight.group // 2
    width = _LANES if inner // 2 % _LANES == 0 else half
    per, tiles = width // half, inner // 2 // width
    most = max(16, _ROWS_BYTES // (per * inner * x.dtype.itemsize) // 16 * 16)
    rows = min(-(-tokens // 16) * 16, most)
    blocks = -(-tokens // rows)
    x = jnp.pad(x, ((0, 0), (0, blocks * rows - tokens), (0, 0))).reshape(len(x), blocks, rows, tiles, 2 * width)
    # A product with zeros and ones is exact, and what TPUs move numbers within a row with.
    chosen = jnp.asarray(_places(per, half), x.dtype)
    x = jnp.einsum("bnrtk,kpl->bntprl", x, chosen, precision=_precision(x))
    x = x.reshape(len(x), blocks, tiles, per * rows, 2 * width)
    columns, apart = min(_COLUMNS, outputs), len(x) > 1
    scales = jnp.moveaxis(weight.scales, 3, 1)  # as they lie in memory, where another axis than groups is the last
    if count == 1:
        scales = scales[:, :, 0]
    out = pl.pallas_call(
        functools.partial(_kernel, per=per),
        out_shape=jax.ShapeDtypeStruct((batch, count, blocks * rows, outputs), out_dtype),
        grid=(batch, count, pl.cdiv(outputs, columns), blocks),
        in_specs=[
            pl.BlockSpec((1, 1, *x.shape[2:]), lambda b, c, n, t: (b if apart else 0, t, 0, 0, 0)),
            pl.BlockSpec((1, 1, columns, inner // 2), lambda b, c, n, t: (b, c, n, 0)),
            pl.BlockSpec(
                (1, groups, *scales.shape[2:-1], columns),
                (lambda b, c, n, t: (b, 0, n)) if count == 1 else (lambda b, c, n, t: (b, 0, 0, n)),
            ),
        ],
        out_specs=pl.BlockSpec((1, 1, rows, columns), lambda b, c, n, t: (b, c, t, n)),
        scratch_shapes=[pltpu.VMEM((groups, columns), jnp.float32)],
        interpret=interpret,
        name="int4_product",
    )(x, weight.values, scales)
    return out[:, :, :tokens]


def _places(per: int, half: int) -> np.ndarray:
    """Tell for each input of a tile, group and place in its row whether the input is there: [K, group, place]."""
    plane, group, j = np.indices((2, per, half)).reshape(3, -1)  # of each place
    source = (group * 2 + plane) * half + j
    here = np.arange(2 * per * half)[:, None, None] == source
    return here & (np.arange(per)[:, None] == group)


def _kernel(x, values, scales, out, scale, *, per):
    rows, width = out.shape[2], x.shape[-1] // 2
    # In float32, of which a row can be read at any place.
    for c in range(scales.shape[2] if scales.ndim == 4 else 1):

        @pl.when(pl.program_id(1) == c)
        def _(c=c):
            mine = scales[0, :, c] if scales.ndim == 4 else scales[0]
            scale[...] = mine.astype(jnp.float32)

    def add(tile, total):
        packed = values[0, 0, :, pl.ds(tile * width, width)].astype(jnp.int32)
        steps = jnp.concatenate([packed & 15, packed >> 4], axis=1) - 8
        parts = jax.lax.dot_general(
            x[0, 0, tile],
            steps.astype(jnp.float32).astype(x.dtype),
            (((1,), (1,)), ((), ())),
            precision=_precision(x),
            preferred_element_type=jnp.float32,
        )
        for group in range(per):
            total += parts[group * rows : (group + 1) * rows] * scale[pl.ds(tile * per + group, 1), :]
        return total

    total, tiles = jnp.zeros(out.shape[2:], jnp.float32), x.shape[2]
    if width == _LANES:
        total = jax.lax.fori_loop(0, tiles, add, total, unroll=2)
    else:  # only known places may lie within a row of lanes
        for tile in range(tiles):
            total = add(tile, total)
    out[0, 0] = total.astype(out.dtype)


def _precision(x) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
