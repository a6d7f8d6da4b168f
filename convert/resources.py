"""Memory, disk, and words to the user."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import pathlib
import shutil
from collections.abc import Iterator

from convert.chunks import CHUNK_BYTES
from ernie_jax.errors import UserError

MAX_THREADS = 4
_BASE_MEMORY_BYTES = 200 << 20  # the interpreter, JAX, names and plan of the largest model


def thread_count(host_memory_gb: float, reserved: int = 0, largest: int = 0) -> int:
    """Return how many threads fit the memory.

    Args:
      reserved: bytes that are used once.
      largest: bytes that each thread uses beside a few chunks.

    Raises:
      UserError: if it is too little for one.
    """
    reserved += _BASE_MEMORY_BYTES
    each = 5 * CHUNK_BYTES + largest  # a chunk, its contents in a wider dtype, and these transposed
    if (fitting := int(host_memory_gb * 1e9 - reserved) // each) < 1:
        least = math.ceil((reserved + each) / 1e7) / 100
        raise UserError(f"--host_memory_gb={host_memory_gb:g} is too little; the least for this model is {least:.2f}")
    return min(MAX_THREADS, fitting)


def check_free(directory: os.PathLike, need: int, what: str) -> None:
    """Check that a local disk has room.

    Raises:
      UserError: if it has not.
    """
    existing = pathlib.Path(directory).absolute()
    while not existing.exists():
        existing = existing.parent
    if (free := shutil.disk_usage(existing).free) < need:
        raise UserError(f"{directory}: {what} needs {need / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free")


@contextlib.contextmanager
def explain_disk_errors(target: os.PathLike, then: str) -> Iterator[None]:
    """Turn a full disk and missing permissions into a UserError; `then` is what the same command will do afterwards."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{target}: the disk is full; make room and repeat the command: {then}") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{error.filename or target}: {error.strerror}") from None
        raise
