"""verify: compare a checkpoint of ours with the one it was converted from, tensor by tensor.

Of quantised tensors the root mean square of the error is held against that of the weights.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath
from tqdm import tqdm

from convert.arrays import Arrays, Slab, in_order
from convert.converted import read_foreign_or_ours
from convert.resources import MAX_THREADS
from convert.shards import TensorReader
from convert.source import ForeignModel, Source, read_model
from convert.table import Placement, parameter_dtypes
from convert.target import checksum
from ernie_jax.checkpoint import parse_dtype, read_manifest
from ernie_jax.distributed import say
from ernie_jax.errors import UserError
from ernie_jax.model import parameter_specs
from ernie_jax.ops import form_of
from ernie_jax.paths import storage_path

# Of a quantised tensor. Normally distributed weights get 0.8 % in int8, 2.6 % in fp8, 9.7 % in int4; those with a few
# large ones some percent in int8, and half as much again in int4.
_MOST_ERROR = {"int8": 0.05, "fp8": 0.05, "int4": 0.2}


def verify(source: str, target: str, *, revision: str | None = None) -> list[str]:
    """Compare every tensor, checksum and small file of a checkpoint with its source.

    Reads both as independently of the conversion as the table of names allows, in slabs. Quantised tensors may differ
    by some percent; the error of each group of them is told.

    Args:
      source: a Hugging Face (or Paddle) checkpoint, a directory or hub id; of a quantised target also a checkpoint of
        ours.
      target: the checkpoint that was converted from it.
      revision: branch, tag or commit of a hub id.

    Returns:
      A sentence for each difference, by tensor or file name; empty if there is none.

    Raises:
      UserError: if either is no intact checkpoint of its kind.
    """
    directory = storage_path(target)
    manifest = read_manifest(directory)
    quantize = manifest.get("quantize")
    model = (read_foreign_or_ours if quantize else read_model)(Source(source, revision))
    forms = {"quantize": quantize, "quantize_embedding": manifest.get("quantize_embedding", False)}
    config = dataclasses.replace(model.config, **forms)
    placements, _ = model.place(config)
    requested = manifest.get("requested_dtype")
    dtypes = parameter_dtypes(config, placements, parse_dtype(requested) if requested else None)

    stored = sum(fields["bytes"] for fields in manifest["parameters"].values()) if "checksums" in manifest else 0
    total = stored + sum(tensor.nbytes for tensor in model.tensors.values())
    with (
        ThreadPoolExecutor(MAX_THREADS) as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc="verify") as bar,
    ):
        differences = [*_compare_small_files(model, directory), *_compare_checksums(manifest, directory, pool, bar)]
        bar.total += bar.n - stored  # files hold some bytes beside the arrays
        arrays = Arrays(directory, manifest["parameters"])
        found = {path: f"{arrays.dtypes[path].name} {list(shape)}" for path, shape in arrays.shapes.items()}
        specs = parameter_specs(config)
        expected = {path: f"{dtypes[path].name} {list(spec.shape)}" for path, spec in specs.items()}
        for path in sorted(found.keys() | expected.keys()):
            if found.get(path) != expected.get(path):
                differences.append(f"{path}: {found.get(path, 'missing')}, expected {expected.get(path, 'nothing')}")
        alike = [one for one in placements if found.get(one.parameter) == expected[one.parameter]]
        errors: dict[str, np.ndarray] = {}
        differences += _compare_tensors(model, alike, arrays, errors, pool, bar)
    for group, squares in errors.items():
        say(f"{group}: relative error {_relative(squares):.2%}")
    return differences


def _compare_small_files(model: ForeignModel, directory: epath.Path) -> Iterator[str]:
    for name, content in model.small_files.items():
        copy = directory / name
        if not copy.exists():
            yield f"{name}: missing"
        elif copy.read_bytes() != content:
            yield f"{name}: differs"


def _compare_checksums(manifest: dict, directory: epath.Path, pool: ThreadPoolExecutor, bar: tqdm) -> Iterator[str]:
    def compare(name: str, expected: str) -> tuple[int, str | None]:
        try:
            content = (directory / name).read_bytes()
        except FileNotFoundError:
            return 0, f"{name}: missing"
        return len(content), None if checksum(content) == expected else f"{name}: checksum differs"

    jobs = (functools.partial(compare, name, crc) for name, crc in manifest.get("checksums", {}).items())
    for nbytes, difference in in_order(pool, jobs, MAX_THREADS):
        bar.update(nbytes)
        if difference:
            yield difference


def _compare_tensors(
    model: ForeignModel,
    placements: list[Placement],
    arrays: Arrays,
    errors: dict[str, np.ndarray],
    pool: ThreadPoolExecutor,
    bar: tqdm,
) -> Iterator[str]:
    """Yield the differences; to `errors` add by group the squares of quantised tensors' errors and of the tensors."""
    with tempfile.TemporaryDirectory(prefix="ernie_jax-") as folder, TensorReader() as reader:
        staging = pathlib.Path(folder)

        def compare(placement: Placement, slab: Slab) -> int | np.ndarray:
            if slab.scales is not None:
                stored, expected = slab.dequantize(), np.empty(slab.size, np.float32)
                reader.read(placement.tensor, slab.start, expected, placement.transposed)
                stored -= expected
                return np.array([np.dot(stored, stored), np.dot(expected, expected)], np.float64)
            stored = slab.read()
            expected = np.empty(slab.size, stored.dtype)
            reader.read(placement.tensor, slab.start, expected, placement.transposed)
            bits = np.dtype(f"u{stored.dtype.itemsize}")
            return int(np.count_nonzero(expected.view(bits) != stored.view(bits)))

        for file in model.headers:
            mine = [placement for placement in placements if placement.tensor.file == file]
            if not mine:
                continue
            reader.open(file, model.source.fetch(file, staging))
            for placement in mine:
                jobs = (functools.partial(compare, placement, slab) for slab in arrays.slabs(placement))
                try:
                    count = sum(in_order(pool, jobs, MAX_THREADS))
                except UserError as error:
                    yield f"{placement.tensor.name}: {error}"
                else:
                    if isinstance(count, np.ndarray):
                        group = re.sub(r"\d+", "*", placement.parameter)
                        errors[group] = errors.get(group, 0) + count
                        most = _MOST_ERROR[form_of(arrays.dtypes[placement.parameter])]
                        if not (error := _relative(count)) <= most:
                            found = f"relative error {error:.2%} in {placement.parameter}, at most {most:.0%}"
                            yield f"{placement.tensor.name}: {found}"
                    elif count:
                        size = math.prod(placement.tensor.shape)
                        yield f"{placement.tensor.name}: {count} of {size} values differ in {placement.parameter}"
                bar.update(placement.tensor.nbytes)
            reader.close(file)
            model.source.release(file, staging)


def _relative(squares: np.ndarray) -> float:
    error, whole = squares
    return math.sqrt(error / whole) if whole else math.inf if error else 0.0
