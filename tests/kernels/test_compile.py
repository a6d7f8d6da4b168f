"""NVIDIA's compiler takes our kernels, without a warning and without a GPU."""

import concurrent.futures
import ctypes
import multiprocessing
import os
import pathlib
import re
import subprocess

import pytest

from ernie_jax import kernels
from ernie_jax.errors import UserError

SOURCES = sorted(pathlib.Path(kernels.__file__).parent.glob("*.cu"))


@pytest.fixture(scope="module")
def nvcc() -> str:
    try:
        return kernels.find_nvcc()[0]
    except UserError as error:
        pytest.skip(str(error))


def test_kernels_compile_without_a_warning(nvcc, tmp_path):
    """For the oldest GPU that they are for; the library below is for an H100."""

    def compile_one(source):
        out = tmp_path / f"{source.stem}.cubin"
        command = [nvcc, *kernels.flags("80"), "-Werror=all-warnings", "-cubin", str(source), "-o", str(out)]
        return subprocess.run(command, capture_output=True, text=True)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(compile_one, SOURCES):
            assert done.returncode == 0, done.stderr


def test_the_library_has_the_handlers(nvcc):
    library = ctypes.CDLL(str(kernels.build("90")))
    calls = (path.read_text() for path in (pathlib.Path(kernels.__file__).parent.parent / "ops").glob("*.py"))
    names = set(re.findall(r'kernels\.call\(\s*"(\w+)"', "".join(calls)))
    assert names and all(hasattr(library, name) for name in names)


def test_processes_that_start_together_compile_once(tmp_path, monkeypatch):
    """With a compiler that takes its time and writes down what it was asked for."""
    log, nvcc = tmp_path / "log", tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f'#!/bin/sh\nsleep 0.2\nfor out; do :; done\necho "$out" >> {log}\ntouch "$out"\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("ERNIE_JAX_CACHE", str(tmp_path / "cache"))
    with concurrent.futures.ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        built = set(pool.map(kernels.build, ["90"] * 3))
    assert len(built) == 1 and built.pop().exists()
    assert len(log.read_text().splitlines()) == len(SOURCES) + 1
