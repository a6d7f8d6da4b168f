"""The parameters of a finished checkpoint, read in slabs of bounded size."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor

import numpy as np
import tensorstore as ts
from etils import epath

from convert.source import is_local
from convert.table import Placement
from convert.target import STATE
from ernie_jax.errors import UserError

_SLAB_BYTES = 32 << 20
CACHE_BYTES = 128 << 20  # a chunk of gate and up serves the tensors of both


@dataclasses.dataclass(frozen=True)
class Slab:
    """Consecutive elements, from `start`, of a tensor in our orientation, and where they are stored."""

    start: int
    size: int
    view: ts.TensorStore

    def read(self) -> np.ndarray:
        """Return the elements, [size], in their stored dtype."""
        return self.view.read().result().reshape(-1)


def open_parameters(directory: epath.Path, paths: Iterable[str]) -> dict[str, ts.TensorStore]:
    """Open the arrays of a checkpoint.

    Raises:
      UserError: if one is missing or damaged.
    """
    context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    root = f"file://{os.path.abspath(directory)}" if is_local(directory) else str(directory)
    opening = {
        path: ts.open(
            # A chunk that is not there is an error, not zeros.
            {"driver": "zarr", "kvstore": f"{root}/{STATE}/{path}/", "fill_missing_data_reads": False},
            context=context,
            read=True,
        )
        for path in paths
    }
    arrays = {}
    for path, opened in opening.items():
        try:
            arrays[path] = opened.result()
        except ValueError as error:
            raise UserError(f"{directory}: parameter {path} is missing or damaged ({_first(error)})") from None
    return arrays


def slabs(placement: Placement, array: ts.TensorStore) -> Iterator[Slab]:
    """Cut the place of a tensor into slabs, in the order of the tensor's elements."""
    start = 0
    for block in placement.blocks:
        view = array[block] if block else array
        view = view[ts.d[:].translate_to[0]]
        row_bytes = view.size // view.shape[0] * array.dtype.numpy_dtype.itemsize
        step = max(1, _SLAB_BYTES // row_bytes)
        for first in range(0, view.shape[0], step):
            part = view[first : min(first + step, view.shape[0])]
            yield Slab(start, part.size, part)
            start += part.size


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


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
