"""Chunks: the files in which a parameter is stored, and how each is filled from source tensors.

A parameter is cut along its leading axes only, so that a chunk is a run of consecutive elements, and a conversion of
any size holds a few chunks in memory. A quantised one is cut between weights that share no scale, and its scales alike.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from convert.shards import StoredTensor, TensorReader
from convert.table import Placement, scale_path
from ernie_jax.errors import UserError
from ernie_jax.ops import Quantized, form_of, quantize

CHUNK_BYTES = 32 << 20  # of a quantised parameter before it is
_EXACT = np.dtype(np.float32)  # in which weights are read to be quantised


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive weights of a parameter, from `start`, that come from consecutive elements of a tensor."""

    start: int
    count: int
    tensor: StoredTensor
    source_start: int
    transposed: bool


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One stored parameter: its shape and that of its chunks, and where its elements come from, in order.

    Attributes:
      runs: none of scales, which are written along with the values.
      scales: those of a quantised parameter.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_shape: tuple[int, ...]
    runs: tuple[Run, ...]
    scales: Parameter | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def packed(self) -> int:
        """How many weights are an element."""
        return 2 if form_of(self.dtype) == "int4" else 1

    def chunks(self) -> Iterator[Chunk]:
        """List the chunks in the order of their elements."""
        size = math.prod(self.chunk_shape)
        counts = [-(-length // step) for length, step in zip(self.shape, self.chunk_shape, strict=True)]
        for position in itertools.product(*map(range, counts)):
            first = [i * step for i, step in zip(position, self.chunk_shape, strict=True)]
            # At most one axis is cut into more than single indices, so only its last chunk can be short.
            kept = [min(c, n - f) for c, n, f in zip(self.chunk_shape, self.shape, first, strict=True)]
            start = int(np.ravel_multi_index(first, self.shape))
            yield Chunk(self, ".".join(map(str, position)), start, math.prod(kept), size)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One file of a parameter: `count` elements from `start`, padded with zeros to `size`; `key` is its zarr name."""

    parameter: Parameter
    key: str
    start: int
    count: int
    size: int

    @property
    def nbytes(self) -> int:
        return self.size * self.parameter.dtype.itemsize

    @property
    def scales(self) -> Chunk | None:
        """The chunk with the scales of this one's values."""
        if (parameter := self.parameter.scales) is None:
            return None
        each = math.prod(self.parameter.shape) // math.prod(parameter.shape)
        key = ".".join(self.key.split(".")[: len(parameter.shape)])
        return Chunk(parameter, key, self.start // each, self.count // each, self.size // each)

    @property
    def form(self) -> str | None:
        """The form that its weights are rounded to."""
        return form_of(self.parameter.dtype)

    @property
    def written_bytes(self) -> int:
        """How many bytes come of it, in one or two files."""
        return self.nbytes + (self.scales.nbytes if self.scales else 0)

    @property
    def buffer_bytes(self) -> int:
        """How many bytes `fill` needs."""
        if self.scales is None:
            return self.nbytes
        return self.size * self.parameter.packed * _EXACT.itemsize

    def pieces(self) -> Iterator[tuple[Run, int, int]]:
        """Yield each run that the chunk overlaps, with the first and last weight of the overlap in the parameter."""
        runs, start, count = self.parameter.runs, *(n * self.parameter.packed for n in (self.start, self.count))
        first = bisect.bisect_right(runs, start, key=lambda run: run.start) - 1
        for run in itertools.islice(runs, first, None):
            if run.start >= start + count:
                return
            yield run, max(run.start, start), min(run.start + run.count, start + count)

    def sources(self) -> set[str]:
        """Name the files that the chunk needs."""
        return {run.tensor.file for run, _, _ in self.pieces()}

    def fill(self, reader: TensorReader, buffer: np.ndarray, rounding: Rounding) -> list[tuple[Chunk, np.ndarray]]:
        """Read the chunk's contents into the front of a byte buffer, and quantise them if that is asked for.

        Args:
          buffer: [at least buffer_bytes] uint8.
          rounding: how they are quantised.

        Returns:
          The chunk with its bytes, [nbytes] uint8, which may be a part of the buffer; then that of its scales.

        Raises:
          UserError: if weights that are to be quantised are not finite.
        """
        scales, packed = self.scales, self.parameter.packed
        elements = buffer[: self.buffer_bytes].view(self.parameter.dtype if scales is None else _EXACT)
        for run, first, last in self.pieces():
            out = elements[first - self.start * packed : last - self.start * packed]
            reader.read(run.tensor, run.source_start + first - run.start, out, run.transposed)
        elements[self.count * packed :] = 0
        if scales is None:
            return [(self, elements.view(np.uint8))]
        try:
            quantized = rounding(self, elements)
        except ValueError as error:
            names = ", ".join(run.tensor.name for run, _, _ in self.pieces())
            raise UserError(f"one of {names} {error}; it cannot be quantised") from None
        found = (self, quantized.values), (scales, quantized.scales)
        return [(chunk, array.reshape(-1).view(np.uint8)) for chunk, array in found]


# Makes of a chunk's weights, in float32, one after the other, the numbers to store, of which only the order counts.
Rounding = Callable[[Chunk, np.ndarray], Quantized]


def nearest(chunk: Chunk, weights: np.ndarray) -> Quantized:
    """Round each weight by itself: a Rounding."""
    return quantize(weights.reshape(chunk.scales.size, -1), form=chunk.form)


def plan_parameters(
    placements: Iterable[Placement], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype]
) -> list[Parameter]:
    """Lay out every parameter: its chunks and the runs that fill it.

    Args:
      shapes, dtypes: of every parameter, by path. Those in the dtype of a form are quantised, and have a sibling
        "scale".
    """
    weights = {path: _weights(shape, dtypes[path]) for path, shape in shapes.items()}
    runs: dict[str, list[Run]] = {path: [] for path in shapes}
    for placement in placements:
        source_start = 0
        for block in placement.blocks:
            for start, count in _block_runs(weights[placement.parameter], block):
                run = Run(start, count, placement.tensor, source_start, placement.transposed)
                runs[placement.parameter].append(run)
                source_start += count
    parameters = []
    for path, shape in shapes.items():
        if path.endswith(".scale"):
            continue  # laid out with its values
        ordered = sorted(runs[path], key=lambda run: run.start)
        ends = itertools.accumulate((run.count for run in ordered), initial=0)
        assert [run.start for run in ordered] + [math.prod(weights[path])] == list(ends), f"{path} is not covered once"
        itemsize, axes, scales = dtypes[path].itemsize, len(shape), None
        if quantized := form_of(dtypes[path]) is not None:
            scale = scale_path(path)
            itemsize, axes = _EXACT.itemsize, min(len(shapes[scale]), len(shape) - 1)
        chunk = _chunk_shape(weights[path], itemsize, axes, single_experts=".experts." in path)
        chunk = (*chunk[:-1], chunk[-1] * shape[-1] // weights[path][-1])
        if quantized:
            scales = Parameter(scale, shapes[scale], dtypes[scale], (*chunk[:axes], *shapes[scale][axes:]), ())
            parameters.append(scales)
        parameters.append(Parameter(path, shape, dtypes[path], chunk, tuple(ordered), scales))
    return parameters


def _weights(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """Return the shape of what is stored in a shape."""
    return (*shape[:-1], 2 * shape[-1]) if form_of(dtype) == "int4" else shape


def _block_runs(shape: tuple[int, ...], block: tuple) -> list[tuple[int, int]]:
    """List (start, count) of the runs of consecutive elements in a block, in its own order."""
    starts, count = [0], math.prod(shape)
    for axis, entry in enumerate(block):
        stride = math.prod(shape[axis + 1 :])
        if isinstance(entry, int):
            starts, count = [start + entry * stride for start in starts], stride
        elif axis == len(block) - 1:
            starts, count = [start + entry.start * stride for start in starts], (entry.stop - entry.start) * stride
        else:
            starts = [start + i * stride for start in starts for i in range(entry.start, entry.stop)]
            count = stride
    return [(start, count) for start in starts]


def _chunk_shape(shape: tuple[int, ...], itemsize: int, axes: int, single_experts: bool) -> tuple[int, ...]:
    """Cut leading axes until a chunk has at most CHUNK_BYTES, each into a power of two so that cuts meet shards.

    Args:
      axes: how many leading axes may be cut.
      single_experts: whether each index of the first axis is cut off alone, however small.
    """
    chunk = list(shape)
    for axis, length in enumerate(shape[:axes]):
        stride = math.prod(shape[axis + 1 :]) * itemsize
        parts = length if single_experts and axis == 0 else 1
        while parts < length and -(-length // parts) * stride > CHUNK_BYTES:
            parts *= 2
        chunk[axis] = -(-length // parts)
        if chunk[axis] * stride <= CHUNK_BYTES:
            break
    return tuple(chunk)
