"""The parameters of a checkpoint, read in slabs of bounded size or, where it is known to be small, whole."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor

import numpy as np
import tensorstore as ts
from etils import epath

from convert.table import Placement, scale_path
from convert.target import STATE
from ernie_jax.errors import UserError
from ernie_jax.ops import Quantized, dequantize, form_of
from ernie_jax.paths import is_local

CACHE_BYTES = 128 << 20  # so that a chunk of gate and up is read once for the tensors of both
_SLAB_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class Slab:
    """Consecutive elements, from `start`, of a tensor in our orientation, and where they are stored.

    Attributes:
      scales: of quantised elements.
      packed: how many elements of the tensor are one of what is stored.
    """

    start: int
    view: ts.TensorStore
    where: str
    scales: ts.TensorStore | None = None
    packed: int = 1

    @property
    def size(self) -> int:
        return self.view.size * self.packed

    def read(self) -> np.ndarray:
        """Return what is stored, flat.

        Raises:
          UserError: if the file that holds them is missing or damaged.
        """
        return _checked(self.view.read(), self.where).reshape(-1)

    def dequantize(self) -> np.ndarray:
        """Return quantised elements, [size], in float32; raises as `read` does."""
        scales = _checked(self.scales.read(), f"{self.where}'s scale")
        return dequantize(Quantized(self.read().reshape(self.view.shape), scales)).reshape(-1)


class Arrays:
    """The arrays of a checkpoint, by parameter."""

    def __init__(self, directory: epath.Path, paths: Iterable[str]):
        """Open them.

        Raises:
          UserError: if one is missing or damaged.
        """
        context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        root = f"file://{os.path.abspath(directory)}" if is_local(directory) else str(directory)
        # A chunk that is not there is an error, not zeros.
        options = {"driver": "zarr", "fill_missing_data_reads": False}
        opening = {
            path: ts.open(options | {"kvstore": f"{root}/{STATE}/{path}/"}, context=context, read=True)
            for path in paths
        }
        self._directory = directory
        self._arrays = {path: _checked(opened, self._where(path)) for path, opened in opening.items()}
        self.shapes = {path: array.shape for path, array in self._arrays.items()}
        self.dtypes = {path: array.dtype.numpy_dtype for path, array in self._arrays.items()}

    def read(self, path: str) -> np.ndarray:
        """Return a whole parameter; raises as `Slab.read` does."""
        return _checked(self._arrays[path].read(), self._where(path))

    def slabs(self, placement: Placement) -> Iterator[Slab]:
        """Cut the place of a tensor into slabs, in the order of the tensor's elements."""
        start = 0
        for block in placement.blocks:
            array = self._arrays[placement.parameter]
            view = (array[block] if block else array)[ts.d[0].translate_to[0]]
            itemsize, scales = array.dtype.numpy_dtype.itemsize, self._arrays.get(scale_path(placement.parameter))
            packed = 2 if form_of(array.dtype.numpy_dtype) == "int4" else 1
            if scales is not None:
                itemsize, scales = 4 * packed, (scales[block] if block else scales)[ts.d[0].translate_to[0]]
            step = max(1, _SLAB_BYTES // (view.size // view.shape[0] * itemsize))
            for first in range(0, view.shape[0], step):
                rows = slice(first, min(first + step, view.shape[0]))
                part = view[rows]
                some = None if scales is None else scales[rows]
                yield (slab := Slab(start, part, self._where(placement.parameter), some, packed))
                start += slab.size

    def _where(self, path: str) -> str:
        return f"{self._directory}: parameter {path}"


def in_order[T](pool: Executor, jobs: Iterable[Callable[[], T]], ahead: int) -> Iterator[T]:
    """Run jobs in a pool, at most `ahead` at a time, and yield their results in order."""
    pending: collections.deque = collections.deque()
    try:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) == ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def _checked[T](future: ts.Future[T], where: str) -> T:
    """Wait for TensorStore, which reports everything as a ValueError."""
    try:
        return future.result()
    except ValueError as error:
        reason = str(error).split(" [", 1)[0]
        raise UserError(f"{where} is missing or damaged ({reason})") from None
