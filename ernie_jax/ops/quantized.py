"""Weights of few bits: int8 and fp8 with a scale for each output channel, int4 with one for each group of inputs."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ernie_jax.errors import UserError

INT8, FP8, INT4 = "int8", "fp8", "int4"
_DTYPES = {INT8: np.dtype(np.int8), FP8: np.dtype(ml_dtypes.float8_e4m3fn), INT4: np.dtype(np.uint8)}
_SCALE_DTYPES = {INT8: np.dtype(np.float32), FP8: np.dtype(np.float32), INT4: np.dtype(ml_dtypes.bfloat16)}
_GROUPS = (128, 64, 32, 16)  # inputs that share a scale in int4; the largest that divides them
STEPS = {INT8: (-127, 127), FP8: (-448, 448), INT4: (-8, 7)}  # the least and the most that stands for a weight
# The scales that are tried, as parts of the weight of the largest magnitude, sign included.
_TRIALS = {
    # Of n weights, a range of 1 - n / (12 * 127^2) is about the best where one is much larger than the rest: 0.987 of
    # 2,560.
    INT8: np.linspace(1.0, 0.945, 12) / 127,
    # What is cut off costs more than it brings; but it matters where between two powers of two the weights lie.
    FP8: np.geomspace(1.0, 2.0, 8, endpoint=False) / 448,
    # The largest weight is on the side that has one more step.
    INT4: np.linspace(1.05, 0.65, 12) / -8,
}
_BLOCK_BYTES = 1 << 18  # of float32 weights: what stays in a core's cache through all trials
_BACKENDS = {"linear": ("xla", "cuda", "mosaic"), "expert": ("dense", "gather", "blocks", "batched", "cuda", "mosaic")}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight [*out, *in]; the dtype of its values says its form.

    int8  values int8 [*out, *in], scales float32 [*out].
    fp8   values float8_e4m3fn [*out, *in], scales float32 [*out].
    int4  values uint8, scales bfloat16; both as the weight but for the last axis. G consecutive inputs on it share a
          scale, and G / 2 bytes: the low four bits of byte j are input j of them, the high four input j + G / 2. Four
          bits n stand for (n - 8) * scale.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def form(self) -> str:
        return form_of(self.values.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight, whatever is packed."""
        *leading, last = self.values.shape
        return (*leading, 2 * last) if self.form == INT4 else self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self):
        return self.values.dtype

    @property
    def group(self) -> int:
        """How many consecutive inputs share a scale in int4."""
        return self.shape[-1] // self.scales.shape[-1]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index) -> Quantized:
        """Index the leading axes, which must be outputs."""
        return Quantized(self.values[index], self.scales[index])

    def as_matrix(self, inner: int) -> Quantized:
        """Return it as [outputs, inner]."""
        if self.form == INT4:
            return Quantized(self.values.reshape(-1, inner // 2), self.scales.reshape(-1, inner // self.group))
        return Quantized(self.values.reshape(-1, inner), self.scales.reshape(-1))


def form_of(dtype) -> str | None:
    """Name the form whose values have a dtype; None for what is no form's."""
    return next((form for form, known in _DTYPES.items() if known == dtype), None)


def quantized_specs(form: str, shape: tuple[int, ...], outputs: int) -> Quantized:
    """Return the shapes and dtypes of a weight [*out, *in] in a form.

    Args:
      outputs: how many leading axes are outputs.

    Raises:
      UserError: if the last axis cannot be cut into groups.
    """
    values, scales = shape, shape[:outputs]
    if form == INT4:
        values, scales = (*shape[:-1], shape[-1] // 2), (*shape[:-1], shape[-1] // group_size(shape[-1]))
    return Quantized(jax.ShapeDtypeStruct(values, _DTYPES[form]), jax.ShapeDtypeStruct(scales, _SCALE_DTYPES[form]))


def group_size(inputs: int) -> int:
    """Return how many of a number of inputs share a scale in int4.

    Raises:
      UserError: if it cannot be cut into groups.
    """
    for size in _GROUPS:
        if inputs % size == 0:
            return size
    raise UserError(f"int4: {inputs} inputs are no multiple of {_GROUPS[-1]}; choose --quantize=int8 or fp8")


def quantize(weight: np.ndarray, outputs: int = 1, form: str = INT8) -> Quantized:
    """Round a host array [*out, *in], with those scales of about a dozen that leave the least squared error.

    In int8 and int4 a range below the largest weight makes the steps of all others smaller.

    Args:
      outputs: how many leading axes are outputs.

    Raises:
      ValueError: on weights that are not finite.
    """
    specs = quantized_specs(form, weight.shape, outputs)
    count = math.prod(specs.scales.shape)
    rows = weight.reshape(count, -1)
    values = np.empty((count, math.prod(specs.values.shape) // max(1, count)), specs.values.dtype)
    scales = np.empty(count, specs.scales.dtype)
    step = max(1, _BLOCK_BYTES // (4 * max(1, rows.shape[1])))
    for first in range(0, count, step):
        part = slice(first, first + step)
        values[part], scales[part] = _quantize_rows(rows[part].astype(np.float32), form)
    return Quantized(values.reshape(specs.values.shape), scales.reshape(specs.scales.shape))


def pack(steps: np.ndarray, form: str) -> np.ndarray:
    """Return the values that stand for float32 steps [n, inputs that share a scale], which must be of the form's."""
    if form != INT4:
        return steps.astype(_DTYPES[form])
    low, high = np.split((steps + 8).astype(np.uint8), 2, axis=1)
    return low | high << 4


def dequantize(weight: Quantized) -> np.ndarray:
    """Return the weight [*out, *in] in float32."""
    values, scales = np.asarray(weight.values), np.asarray(weight.scales, np.float32)
    if weight.form == INT4:
        packed = values.reshape(scales.size, -1)
        steps = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32) - 8
        return (steps * scales.reshape(-1, 1)).reshape(weight.shape)
    return values.astype(np.float32) * scales.reshape(*scales.shape, *(1,) * (values.ndim - scales.ndim))


def widen(weight: Quantized, dtype: jnp.dtype) -> jax.Array:
    """Return the weight [*out, *in], rounded once to `dtype`: what `dequantize` is on the host, in traced code."""
    steps, scales = weight.values, weight.scales.astype(jnp.float32)
    if weight.form == INT4:
        packed = steps.reshape(*scales.shape, -1)
        steps = jnp.concatenate([packed & 15, packed >> 4], axis=-1).astype(jnp.int8) - 8
    wide = steps.astype(jnp.float32) * scales.reshape(*scales.shape, *(1,) * (steps.ndim - scales.ndim))
    return wide.reshape(weight.shape).astype(dtype)


def check_takes_quantized(op: str, backend: str | None, form: str) -> None:
    """Check that a backend computes with quantised weights.

    Args:
      op: linear or expert.
      backend: None, the choice by platform and shape, does.

    Raises:
      UserError: if it does not.
    """
    if backend not in (None, *_BACKENDS[op]):
        known = " or ".join(_BACKENDS[op])
        raise UserError(f"ops: {op} backend {backend} does not take {form} weights; leave it out or choose {known}")


def _quantize_rows(rows: np.ndarray, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Quantise [n, inputs that share a scale]."""
    scales = _best_scales(rows, form)
    exact = rows / scales.astype(np.float32)[:, None]
    if form != FP8:
        np.rint(exact, out=exact)
    np.clip(exact, *STEPS[form], out=exact)
    return pack(exact, form), scales


def _best_scales(rows: np.ndarray, form: str) -> np.ndarray:
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)[:, 0]
    if not np.isfinite(largest).all():
        raise ValueError("holds values that are not finite")
    if form != INT4:
        largest = np.abs(largest)
    unit = rows / np.where(largest == 0, 1, largest)[:, None]
    exact, rounded = np.empty_like(unit), np.empty_like(unit)
    least, best = np.full(len(rows), np.inf, np.float32), np.ones(len(rows), _SCALE_DTYPES[form])
    for part in _TRIALS[form]:
        scales = (largest * np.float32(part)).astype(best.dtype)
        scales[scales == 0] = 1  # weights of zero, or so small that they become it
        steps = largest / scales.astype(np.float32)
        np.multiply(unit, steps[:, None], out=exact)
        if form == FP8:
            # Keep three bits of the fraction, as a cast does, which takes ten times as long.
            np.add(exact.view(np.uint32), 1 << 19, out=rounded.view(np.uint32))
            np.bitwise_and(rounded.view(np.uint32), 0xFFF00000, out=rounded.view(np.uint32))
        else:
            np.rint(exact, out=rounded)
            np.clip(rounded, *STEPS[form], out=rounded)
        exact -= rounded
        steps[steps == 0] = 1
        errors = np.einsum("ij,ij->i", exact, exact) / steps / steps
        better = errors < least
        least[better], best[better] = errors[better], scales[better]
    return best
