"""CUDA kernels of our own: compiled once on the user's machine, called through XLA's foreign function interface."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import ctypes
import fcntl
import functools
import hashlib
import os
import pathlib
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from ernie_jax.errors import UserError
from ernie_jax.paths import cache_directory

_SOURCES = pathlib.Path(__file__).parent
_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("capability", default=None)


def call(name: str, out, *args: jax.Array, aliases: dict[int, int] | None = None, **attributes: int | float):
    """Call the handler `name` of one of the .cu files.

    Args:
      out: a ShapeDtypeStruct or a sequence of them.
      aliases: which input's buffer becomes which output's.
      attributes: what the handler takes as int64 (whole numbers) or float.

    Raises:
      UserError: if the kernels cannot be compiled here.
    """
    _register(name, capability().replace(".", ""))
    attributes = {
        key: np.float32(value) if isinstance(value, float) else np.int64(value) for key, value in attributes.items()
    }
    return jax.ffi.ffi_call(name, out, input_output_aliases=aliases)(*args, **attributes)


@contextlib.contextmanager
def compiling_for(capability: str | None) -> Iterator[None]:
    """Choose the compute capability that programs traced within are for, as in "9.0"; None leaves it as it is."""
    token = _target.set(capability or _target.get())
    try:
        yield
    finally:
        _target.reset(token)


def capability() -> str | None:
    """Return the compute capability of the GPUs that are compiled for, by default this process's; None without any."""
    return _target.get() or _local_capability()


@functools.cache
def _local_capability() -> str | None:
    try:
        return jax.local_devices(backend="gpu")[0].compute_capability
    except RuntimeError:
        return None


@functools.cache
def _register(name: str, capability: str) -> None:
    handler = getattr(_library(capability), name)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="CUDA")


@functools.cache
def _library(capability: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(build(capability)))


def build(capability: str) -> pathlib.Path:
    """Compile the kernels for a compute capability ("90") into the cache, unless they are there; return the library.

    Raises:
      UserError: if there is no nvcc or no C++ compiler, or they fail.
    """
    nvcc, libraries = find_nvcc()
    files = sorted(_SOURCES.glob("*.cu*"))
    state = hashlib.sha256("".join((capability, jax.__version__, nvcc, *map(pathlib.Path.read_text, files))).encode())
    target = cache_directory() / "kernels" / f"sm{capability}-{state.hexdigest()[:16]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:  # processes of a host all want it when they start
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            print(f"compiling the CUDA kernels for sm_{capability}, once, with {nvcc}", file=sys.stderr, flush=True)
            _compile([file for file in files if file.suffix == ".cu"], capability, nvcc, libraries, target)
    return target


def _compile(
    sources: Sequence[pathlib.Path], capability: str, nvcc: str, libraries: Sequence[str], target: pathlib.Path
) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [os.path.join(scratch, file.stem + ".o") for file in sources]
        compiler = [nvcc, *flags(capability), "-c"]
        commands = [[*compiler, str(file), "-o", out] for file, out in zip(sources, objects, strict=True)]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(_run, commands))
        library = os.path.join(scratch, target.name)
        _run([nvcc, f"-arch=sm_{capability}", "-shared", *(f"-L{path}" for path in libraries), *objects, "-o", library])
        os.replace(library, target)


def flags(capability: str) -> list[str]:
    """Return nvcc's flags for a source; XLA's headers are none of ours, their warnings neither."""
    include = ["-isystem", jax.ffi.include_dir(), f"-I{_SOURCES}"]
    return [f"-arch=sm_{capability}", "-std=c++17", "-O3", "-Xcompiler=-fPIC", *include]


def find_nvcc() -> tuple[str, list[str]]:
    """Return the path of NVIDIA's compiler and where its libraries lie: $CUDA_HOME, PATH, or pip's nvidia packages.

    Raises:
      UserError: if there is none.
    """
    homes = [os.environ.get("CUDA_HOME"), *(os.path.join(path, "nvidia", "cu13") for path in _site_packages())]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    found = [path for path in candidates if os.access(path, os.X_OK)]
    nvcc = found[0] if found else shutil.which("nvcc") or next(iter(_installed()), None)
    if nvcc is None:
        raise UserError(
            "no nvcc to compile the CUDA kernels with: pip install 'ernie-jax[cuda]', or set CUDA_HOME; without them, "
            "--ops=attention=xla,experts=blocks,linear=xla,router=xla runs on any GPU"
        )
    home = pathlib.Path(nvcc).resolve().parent.parent
    return nvcc, [str(path) for path in (home / "lib64", home / "lib") if path.is_dir()]


def _site_packages() -> Sequence[str]:
    return [*sys.path, *site.getsitepackages()]


def _installed() -> list[str]:
    return [str(path) for path in sorted(pathlib.Path("/usr/local").glob("cuda*/bin/nvcc"))]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"the CUDA kernels do not compile with {command[0]}: {(done.stderr or done.stdout).strip()[-600:]}"
        )
