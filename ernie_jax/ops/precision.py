"""Products and activations that round once: float32 operands are really float32 on every chip."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from ernie_jax.errors import UserError
from ernie_jax.ops import mosaic, stream
from ernie_jax.ops.adapted import Adapted
from ernie_jax.ops.int4 import int4_einsum
from ernie_jax.ops.quantized import INT4, Quantized, check_takes_quantized, widen
from ernie_jax.ops.stream import linear_problem, operand_problem

_MANY = 1024  # tokens whose products fill a GPU with tiles, so that no library splits the contracted axis


def precision_of(*operands: jax.Array) -> jax.lax.Precision | None:
    """Return HIGHEST for float32 operands: the default is TF32 on GPUs and bfloat16 passes on TPUs."""
    return jax.lax.Precision.HIGHEST if all(x.dtype == jnp.float32 for x in operands) else None


def einsum(
    subscripts: str, x: jax.Array, y: jax.Array | Quantized | Adapted, out_dtype: jnp.dtype | None = None
) -> jax.Array:
    """Contract two arrays, accumulating in float32 and rounding once to `out_dtype` (default: that of `x`).

    A quantised `y` is [*out, *in]. In int4 only the last axis of both may be contracted.
    """
    if isinstance(y, Adapted):
        first, second = y.low_rank(subscripts)
        more = einsum(second, einsum(first, x, y.down), y.up, jnp.float32)
        return (einsum(subscripts, x, y.weight, jnp.float32) + more).astype(out_dtype or x.dtype)
    if isinstance(y, Quantized) and y.form == INT4:
        return int4_einsum(subscripts, x, y, out_dtype or x.dtype)
    if isinstance(y, Quantized):
        inputs, output = subscripts.split("->")
        channels = inputs.split(",")[1][: y.scales.ndim]
        scales = y.scales.transpose(sorted(range(y.scales.ndim), key=lambda axis: output.index(channels[axis])))
        scales = jnp.expand_dims(scales, [axis for axis, label in enumerate(output) if label not in channels])
        out = einsum(subscripts, x, y.values.astype(x.dtype), jnp.float32) * scales
        return out.astype(out_dtype or x.dtype)
    out = jnp.einsum(subscripts, x, y, precision=precision_of(x, y), preferred_element_type=jnp.float32)
    return out.astype(out_dtype or x.dtype)


def linear(
    subscripts: str,
    x: jax.Array,
    weight: jax.Array | Quantized | Adapted,
    bias: jax.Array | None = None,
    backend: str = "xla",
) -> jax.Array:
    """Contract the last axes of x with those of the weight [*out, *in] and add a bias; round to the dtype of `x`.

    Args:
      backend: a name of LINEAR_BACKENDS.

    Raises:
      UserError: if the backend does not take these shapes or dtypes.
    """
    if isinstance(weight, Quantized):
        check_takes_quantized("linear", backend, weight.form)
    return LINEAR_BACKENDS[backend](subscripts, x, weight, bias)


def default_linear_backend(platform: str, x: jax.Array, weight: jax.Array | Quantized, inner: int) -> str:
    """Choose a backend: on GPUs a kernel of ours, where one takes the product.

    Args:
      inner: K, the product of the contracted axes.
    """
    if platform == "gpu" and operand_problem(x, weight) is None:
        shape = x.size // inner, inner, weight.size // inner, weight.dtype
        if linear_problem(*shape) is None:
            return "cuda"
        if mosaic.product_problem(*shape) is None and mosaic.product_pays(*shape):
            return "mosaic"
    return "xla"


def _xla(subscripts, x, weight, bias):
    def product(x, w):
        if isinstance(w, Adapted):
            return product(x, w.weight) + product(product(x, w.down).astype(x.dtype), w.up)
        if not isinstance(w, Quantized):
            return plain(x, w)
        if len(x) < _MANY:
            return einsum("td,od->to", x, w, jnp.float32)
        # The weight first, scales and all: sums need no other kernel then. For gradients it is made again, not kept.
        return jax.checkpoint(lambda x, w: plain(x, widen(w, x.dtype)))(x, w)

    def plain(x, w):
        # Of many tokens the product itself rounds its sums: where it is float32, cuBLAS writes that, and another kernel
        # reads and rounds it. Of few it may be a sum of parts, each of which would be rounded then.
        dtype = x.dtype if bias is None and len(x) >= _MANY else jnp.float32
        return jnp.einsum("td,od->to", x, w, precision=precision_of(x, w), preferred_element_type=dtype)

    out = _product(subscripts, x, weight, product)
    return (out if bias is None else out + bias.astype(jnp.float32)).astype(x.dtype)


def _cuda(subscripts, x, weight, bias):
    out = _product(subscripts, x, weight, stream.linear)
    return out if bias is None else out + bias


def _mosaic(subscripts, x, weight, bias):
    if isinstance(weight, Adapted):
        raise UserError("linear backend mosaic takes no adapters; use linear backend xla")
    out = _product(subscripts, x, weight, mosaic.product)
    return (out if bias is None else out + bias.astype(jnp.float32)).astype(x.dtype)


def _product(subscripts, x, weight, product):
    """Call product([T, K], [N, K]): XLA may order several contracted axes anew, and then copies the whole weight."""
    inputs, outputs = subscripts.split("->")
    contracted = len(set(inputs.split(",")[1]) - set(outputs))
    inner = math.prod(weight.shape[-contracted:])
    matrix = weight.as_matrix(inner) if isinstance(weight, Quantized | Adapted) else weight.reshape(-1, inner)
    out = product(x.reshape(-1, inner), matrix)
    return out.reshape(*x.shape[:-contracted], *weight.shape[:-contracted])


LINEAR_BACKENDS = {"xla": _xla, "cuda": _cuda, "mosaic": _mosaic}


def swiglu(gate_up: jax.Array, axis: int) -> jax.Array:
    """Return silu(gate) * up, of which `axis` holds gate and up; silu is computed in float32 and rounded once."""
    gate, up = jnp.moveaxis(gate_up, axis, 0)
    return jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up
