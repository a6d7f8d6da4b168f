"""export: a checkpoint of ours becomes a Hugging Face directory again."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath
from tqdm import tqdm

from convert.arrays import CACHE_BYTES, Arrays, Slab, in_order
from convert.resources import check_free, explain_disk_errors, thread_count
from convert.shards import FLOAT_DTYPES, StoredTensor, encode_header
from convert.source import INDEX, SINGLE
from convert.table import Placement, expand, is_lossless, place
from ernie_jax.checkpoint import SMALL_FILES, read_config, read_manifest
from ernie_jax.config import ModelConfig
from ernie_jax.distributed import say
from ernie_jax.errors import UserError
from ernie_jax.model import parameter_specs
from ernie_jax.paths import is_local, storage_path

_SHARD_BYTES = 5_000_000_000  # of a checkpoint that never came in shards
_DTYPE_NAMES = {FLOAT_DTYPES[name]: name for name in ("BF16", "F16", "F32")}


@dataclasses.dataclass(frozen=True)
class _Export:
    """A tensor to write: its place in the parameters, and its dtype in the file."""

    placement: Placement
    arrays: Arrays
    dtype: str

    @property
    def name(self) -> str:
        return self.placement.tensor.name

    @property
    def nbytes(self) -> int:
        return math.prod(self.placement.tensor.shape) * FLOAT_DTYPES[self.dtype].itemsize

    def jobs(self) -> Iterator[Callable[[], np.ndarray]]:
        """Yield what reads the bytes of the tensor, part by part in order; a transposed one comes in one part."""
        if self.placement.transposed:
            yield self._read_transposed
        else:
            for slab in self.arrays.slabs(self.placement):
                yield functools.partial(self._read, slab)

    def _read(self, slab: Slab) -> np.ndarray:
        return slab.read().astype(FLOAT_DTYPES[self.dtype], copy=False)

    def _read_transposed(self) -> np.ndarray:
        columns, rows = self.placement.tensor.shape
        out = np.empty((columns, rows), FLOAT_DTYPES[self.dtype])
        for slab in self.arrays.slabs(self.placement):
            first, last = slab.start // columns, (slab.start + slab.size) // columns
            out[:, first:last] = slab.read().reshape(last - first, columns).T
        return out


def export(source: str, target: str, *, host_memory_gb: float = 4.0, overwrite: bool = False) -> None:
    """Write a checkpoint as a Hugging Face directory that `transformers` loads.

    A converted checkpoint gives back the name, dtype, shape, bytes and shard of every tensor it came from; where
    --dtype narrowed a tensor, it keeps the narrower dtype. One that was trained here gets Hugging Face's names.

    Args:
      source: a finished checkpoint, local or gs://.
      target: the directory to write, local or gs://. It appears when it is complete.
      host_memory_gb: how much anonymous memory to use at most.
      overwrite: replace the model in a Hugging Face directory of an ERNIE 4.5 model.

    Raises:
      UserError: on a source that is no intact checkpoint, a target that may not be written, a full disk.
    """
    directory, out = storage_path(source), storage_path(target)
    manifest, config = read_manifest(directory), read_config(directory)
    if config.quantize:
        raise UserError(f"{source}: its weights are rounded to {config.quantize}; export a checkpoint that is not")
    _check_target(out, overwrite)
    tensors = _source_tensors(manifest) or _own_tensors(config, manifest["parameters"])
    placements = {placement.tensor.name: placement for placement in place(config, tensors, source)[0]}
    arrays = _open_arrays(directory, config)
    shards: dict[str, list[_Export]] = {}
    for name, tensor in tensors.items():
        stored = arrays.dtypes[placements[name].parameter]
        dtype = tensor.dtype if is_lossless(tensor.numpy_dtype, stored) else _DTYPE_NAMES[stored]
        shards.setdefault(tensor.file, []).append(_Export(placements[name], arrays, dtype))
    exports = [one for shard in shards.values() for one in shard]
    whole = max((one.nbytes for one in exports if one.placement.transposed), default=0)
    threads = thread_count(host_memory_gb, reserved=CACHE_BYTES, largest=whole)
    _say_what_differs(source, manifest, exports)

    total = sum(one.nbytes for one in exports)
    if is_local(out):
        check_free(out, total, "the export")
    partial = out.with_name(f".{out.name}.partial")
    with explain_disk_errors(out, "it starts again"):
        if partial.exists():
            partial.rmtree()  # of an export that was killed
        partial.mkdir(parents=True)
        try:
            metadata = manifest.get("shards", {})
            with (
                tqdm(total=total, unit="B", unit_scale=True, desc="export") as bar,
                ThreadPoolExecutor(threads) as pool,
            ):
                for file, shard in shards.items():
                    _write_shard(partial / file, shard, metadata.get(file, {}), pool, threads, bar)
            if list(shards) != [SINGLE]:
                _write_index(partial / INDEX, shards, total)
            for name in SMALL_FILES:
                if (directory / name).exists():
                    (partial / name).write_bytes((directory / name).read_bytes())
        except BaseException:
            partial.rmtree()
            raise
        _move(partial, out)


def _check_target(target: epath.Path, overwrite: bool) -> None:
    """Check that a target may be written: it must be new, empty, or with `overwrite` a model of this family.

    Raises:
      UserError: if it may not.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target}: exists and is not a directory; choose another --target")
    entries = {entry.name for entry in target.iterdir()}
    if not entries:
        return
    if "config.json" not in entries or not entries & {INDEX, SINGLE}:
        raise UserError(f"{target}: exists and is not a Hugging Face model directory; choose another --target")
    ModelConfig.from_file(target / "config.json")
    if not overwrite:
        raise UserError(f"{target}: exists; pass --overwrite to replace the model in it")


def _open_arrays(directory: epath.Path, config: ModelConfig) -> Arrays:
    """Open the parameters that the model of a config has.

    Raises:
      UserError: if one is missing, damaged or of another shape.
    """
    specs = parameter_specs(config)
    arrays = Arrays(directory, specs)
    for path, spec in specs.items():
        if arrays.shapes[path] != spec.shape:
            raise UserError(f"{directory}: {path} is {list(arrays.shapes[path])}, config.json says {list(spec.shape)}")
    return arrays


def _source_tensors(manifest: dict) -> dict[str, StoredTensor]:
    """List the tensors that the checkpoint was converted from, in their order; none if it was trained here."""
    return {
        name: StoredTensor(name, fields["dtype"], tuple(fields["shape"]), fields["file"])
        for name, fields in manifest.get("tensors", {}).items()
        if name not in manifest["ignored"]
    }


def _own_tensors(config: ModelConfig, parameters: Mapping[str, dict]) -> dict[str, StoredTensor]:
    """Name the tensors of a checkpoint that was trained here as Hugging Face does, in shards of _SHARD_BYTES."""
    shards: list[list[tuple]] = [[]]
    filled = 0
    for name, rule in expand(config).items():
        (shape,) = (shape for shape, transposed in rule.shapes.items() if not transposed)
        dtype = _DTYPE_NAMES[np.dtype(parameters[rule.parameter]["dtype"])]
        nbytes = math.prod(shape) * FLOAT_DTYPES[dtype].itemsize
        if filled and filled + nbytes > _SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, dtype, shape))
        filled += nbytes
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    return {
        name: StoredTensor(name, dtype, shape, file)
        for file, shard in zip(files, shards, strict=True)
        for name, dtype, shape in shard
    }


def _say_what_differs(source: str, manifest: dict, exports: list[_Export]) -> None:
    for name in manifest.get("ignored", []):
        say(f"{source}: {name} was ignored by the conversion and is not written")
    narrowed = [one for one in exports if one.dtype != one.placement.tensor.dtype]
    if narrowed:
        first = narrowed[0]
        example = f"such as {first.name}: {first.placement.tensor.dtype} to {first.dtype}"
        say(f"{source}: {len(narrowed)} tensors stay as --dtype narrowed them ({example})")


def _write_shard(
    path: epath.Path, exports: list[_Export], metadata: dict, pool: ThreadPoolExecutor, threads: int, bar: tqdm
) -> None:
    described = [(one.name, one.dtype, one.placement.tensor.shape, one.nbytes) for one in exports]
    jobs = (job for one in exports for job in one.jobs())
    with path.open("wb") as file:
        file.write(encode_header(described, {"format": "pt"} | metadata))
        for part in in_order(pool, jobs, threads):
            file.write(part.reshape(-1).view(np.uint8).data)
            bar.update(part.nbytes)
        if is_local(path):
            file.flush()
            os.fsync(file.fileno())


def _write_index(path: epath.Path, shards: Mapping[str, list[_Export]], total: int) -> None:
    weight_map = {one.name: file for file, shard in shards.items() for one in shard}
    elements = sum(math.prod(one.placement.tensor.shape) for shard in shards.values() for one in shard)
    metadata = {"total_parameters": elements, "total_size": total}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n")


def _move(partial: epath.Path, target: epath.Path) -> None:
    """Give a complete export its name; in a directory that exists, config.json goes first and comes last."""
    if target.exists():
        for old in target.iterdir():
            if old.name in (*SMALL_FILES, INDEX) or old.name.endswith(".safetensors"):
                old.unlink()
        for new in sorted(partial.iterdir(), key=lambda entry: entry.name == "config.json"):
            new.rename(target / new.name)
        partial.rmdir()
    else:
        partial.rename(target)
