"""Our CUDA kernels on the CPU: compiled by g++ as ordinary C++, called by the same wrappers as on a GPU.

    with emulated():
        out = linear("td,od->to", x, weight, backend="cuda")

What a GPU would punish raises JaxRuntimeError, which names kernel, thread and line: accesses out of bounds or not
aligned, reads of shared memory that nobody has written, accesses to it with no barrier between, reads of an
asynchronous copy before its wait, divergence at collectives, deadlocks. Results are NaN until written. broken.cu has an
example of each.

It does not see races on global memory other than by wrong results, kernels of which one block waits for another outside
a cluster (blocks run one after the other), what a missing __threadfence does, nor anything about speed. What kernels
use of CUDA stands in include/: a new intrinsic goes to cuda_runtime.h, a new wrapper of PTX in kernels/ptx.cuh to
ptx_emulated.h as well.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from unittest import mock

import jax

from ernie_jax import kernels
from ernie_jax.paths import cache_directory

_HERE = pathlib.Path(__file__).parent
_KERNELS = pathlib.Path(kernels.__file__).parent
_ORDERS = ("shuffled", "forward", "backward")
_FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", f"-I{_HERE}/include"]
# The instrumentation calls memory.cpp. nvcc's own front end says more about the sources than -Wall would here.
_KERNEL_FLAGS = [
    "-x", "c++", "-DERNIE_EMULATED", "-fno-strict-aliasing", "-ffp-contract=off", f"-I{_KERNELS}",
    "-fsanitize=thread,alignment,bounds-strict", "--param=tsan-instrument-func-entry-exit=0",
    "-Wno-unknown-pragmas", "-Wno-sign-compare", "-Wno-maybe-uninitialized",
]  # fmt: skip


def problem() -> str | None:
    """Say why kernels cannot be emulated here, if they cannot."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return "the emulator switches stacks on x86-64 Linux only"
    return None if shutil.which("g++") else "needs g++"


@contextlib.contextmanager
def emulated(
    order: str = "shuffled",
    seed: int | None = None,
    processors: int = 8,
    unwritten: bool = False,
    sources: Sequence[pathlib.Path] = (),
) -> Iterator[None]:
    """Let `kernels.call` run the kernels on the CPU.

    Args:
      order: of threads between synchronisations and of blocks: "shuffled", or "forward" or "backward", where each warp
        runs as far as it can.
      seed: of a shuffled order; by default $ERNIE_EMULATOR_SEED or a fresh one, which is printed.
      processors: multiprocessors of the GPU.
      unwritten: let kernels read shared memory that nobody has written; it is NaN.
      sources: .cu files, instead of the project's.
    """
    if seed is None:
        seed = int(os.environ.get("ERNIE_EMULATOR_SEED") or int.from_bytes(os.urandom(4), "little"))
        print(f"ERNIE_EMULATOR_SEED={seed}")  # pytest shows it where a test fails
    library = build(tuple(sources) or tuple(sorted(_KERNELS.glob("*.cu"))))
    _load(library).emulator_configure(_ORDERS.index(order), ctypes.c_uint64(seed), processors, unwritten)
    register = functools.partial(_register, library)
    with kernels.compiling_for("9.0"), mock.patch.object(kernels, "_register", register):
        yield


@functools.cache
def _load(library: pathlib.Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


@functools.cache
def _register(library: pathlib.Path, name: str, capability: str) -> None:
    handler = getattr(_load(library), name)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")


def build(sources: Sequence[pathlib.Path]) -> pathlib.Path:
    """Compile .cu files and the emulator into the cache, unless they are there; return the library."""
    include = jax.ffi.include_dir()
    files = [*sources, *_KERNELS.glob("*.cuh"), *_HERE.glob("*.*"), *_HERE.glob("include/*")]
    texts = (path.read_text() for path in sorted(files))
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    state = hashlib.sha256("\0".join([version, str(include), *map(str, sources), *texts]).encode())
    target = cache_directory() / "kernels" / f"emulated-{state.hexdigest()[:16]}.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "emulated.lock", "w") as lock:  # several workers of a test run want the same
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                _compile(sources, include, pathlib.Path(scratch), target)
    return target


def _compile(sources: Sequence[pathlib.Path], include: str, scratch: pathlib.Path, target: pathlib.Path) -> None:
    # The longest first.
    files = [*sorted(sources, key=lambda path: -path.stat().st_size), *sorted(_HERE.glob("*.cpp"))]
    objects = [scratch / f"{index}.o" for index in range(len(files))]
    commands = [
        ["g++", *_FLAGS, "-isystem", include, *(_KERNEL_FLAGS if file.suffix == ".cu" else ()), "-c", file, "-o", out]
        for file, out in zip(files, objects, strict=True)
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    library = scratch / target.name
    _run(["g++", "-shared", "-Wl,-z,defs", *objects, "-o", library])
    os.replace(library, target)


def _run(command: Sequence[str | pathlib.Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
