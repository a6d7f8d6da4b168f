"""Weights in int8 with a float32 scale for each output channel, which factors out of the product with them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from ernie_jax.errors import UserError

_MOST = 127  # symmetric: -128 is not used
# Parts of a channel's maximum that are tried as the range. Of n weights, a part 1 - n / (12 * 127^2) is about the best
# where one is much larger than the rest: 0.987 of 2,560.
_RANGES = np.linspace(1.0, 0.945, 12, dtype=np.float32)
_BLOCK_BYTES = 1 << 18  # of float32 weights: what stays in a core's cache through all trials
_BACKENDS = {"linear": ("xla",), "expert": ("dense", "gather", "blocks", "batched"), "halves": ("none",)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight: values [*out, *in] int8 times scales [*out] float32."""

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def size(self) -> int:
        return self.values.size

    @property
    def dtype(self):
        return self.values.dtype

    def __getitem__(self, index) -> Quantized:
        """Index the leading axes, which must be outputs."""
        return Quantized(self.values[index], self.scales[index])

    def as_matrix(self, inner: int) -> Quantized:
        """Return it as [outputs, inner]."""
        return Quantized(self.values.reshape(-1, inner), self.scales.reshape(-1))


def quantize(weight: np.ndarray, outputs: int = 1) -> Quantized:
    """Round a host array [*out, *in] to int8, with those scales of a dozen that leave the least squared error.

    Clipping a channel's largest weights makes the steps of all others smaller.

    Args:
      outputs: how many leading axes are outputs.

    Raises:
      ValueError: on weights that are not finite.
    """
    shape = weight.shape[:outputs]
    matrix = weight.reshape(np.prod(shape, dtype=int), -1)
    values, scales = np.empty(matrix.shape, np.int8), np.empty(len(matrix), np.float32)
    step = max(1, _BLOCK_BYTES // (4 * matrix.shape[1]))
    for first in range(0, len(matrix), step):
        rows = slice(first, first + step)
        values[rows], scales[rows] = _quantize_rows(matrix[rows].astype(np.float32))
    return Quantized(values.reshape(weight.shape), scales.reshape(shape))


def dequantize(weight: Quantized) -> np.ndarray:
    """Return the weight [*out, *in] in float32."""
    values, scales = np.asarray(weight.values, np.float32), np.asarray(weight.scales)
    return values * scales.reshape(*scales.shape, *(1,) * (values.ndim - scales.ndim))


def check_takes_quantized(op: str, backend: str | None) -> None:
    """Check that a backend computes with quantised weights.

    Args:
      op: linear, expert or halves.
      backend: None, the choice by platform and shape, does.

    Raises:
      UserError: if it does not.
    """
    if backend not in (None, *_BACKENDS[op]):
        known = " or ".join(_BACKENDS[op])
        raise UserError(f"ops: {op} backend {backend} does not take int8 weights; leave it out or choose {known}")


def _quantize_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    largest = np.abs(rows).max(axis=1)
    if not np.isfinite(largest).all():
        raise ValueError("holds values that are not finite")
    best = np.full(len(rows), np.inf, np.float32)
    values, scales = np.zeros(rows.shape, np.int8), np.ones(len(rows), np.float32)
    for part in _RANGES:
        scale = largest * (part / _MOST)
        scale[scale == 0] = 1  # a channel of zeros
        exact = rows / scale[:, None]
        rounded = np.clip(np.rint(exact), -_MOST, _MOST)
        exact -= rounded
        error = np.einsum("ij,ij->i", exact, exact) * scale**2
        better = error < best
        best[better], scales[better] = error[better], scale[better]
        values[better] = rounded[better]
    return values, scales
