"""Paths of flags and arguments: local or gs://."""

from __future__ import annotations

import importlib.util
import os
import pathlib

from etils import epath

from ernie_jax.errors import UserError


def storage_path(path: str | os.PathLike) -> epath.Path:
    """Return a path, a local one absolute (Orbax asks for that) and with ~ expanded.

    Raises:
      UserError: on gs:// without a package that reads it.
    """
    if not is_local(path):
        if not any(map(importlib.util.find_spec, ("gcsfs", "tensorflow"))):
            raise UserError(f"{path}: gs:// paths need the package gcsfs: pip install gcsfs")
        return epath.Path(path)
    return epath.Path(os.path.abspath(os.path.expanduser(path)))


def is_local(path: str | os.PathLike) -> bool:
    """Tell whether a path is on this machine's own file system."""
    return "://" not in str(path)


def cache_directory() -> pathlib.Path:
    """Return where converted models, compiled programs and kernels are kept: $ERNIE_JAX_CACHE or ~/.cache/ernie_jax."""
    return pathlib.Path(os.environ.get("ERNIE_JAX_CACHE") or pathlib.Path.home() / ".cache" / "ernie_jax")
