"""A checkpoint of ours as a source: its weights are rounded to another form without the checkpoint it came from.

Each chunk is a file of consecutive numbers, and taken for a tensor that fills that part of its parameter.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator

import numpy as np

from convert.shards import FLOAT_DTYPES, Header, StoredTensor
from convert.source import INDEX, SINGLE, ForeignModel, Source, read_model
from convert.table import Placement
from convert.target import STATE
from ernie_jax.checkpoint import MANIFEST, SMALL_FILES, check_files, check_parameters, read_config, read_manifest
from ernie_jax.errors import UserError
from ernie_jax.model import parameter_specs

_DTYPE_NAMES = {dtype.name: name for name, dtype in FLOAT_DTYPES.items() if name != "U16"}
_ORIGIN = ("source", "revision", "requested_dtype", "shards", "tensors", "ignored")


def read_foreign_or_ours(source: Source) -> ForeignModel:
    """Read a source of any layout, that of our own checkpoints included; raises as `read_model` does."""
    files = source.files()
    if MANIFEST not in files or {INDEX, SINGLE} & set(files) or source.revision:
        return read_model(source)
    manifest, config = read_manifest(source.root), read_config(source.root)
    if config.quantize:
        raise UserError(f"{source.name}: its weights are rounded to {config.quantize}; pass a checkpoint that is not")
    shapes = {path: spec.shape for path, spec in parameter_specs(config).items()}
    check_parameters(source.name, shapes, manifest["parameters"])
    check_files(source.root, list(shapes))
    small_files = {name: source.read_bytes(name) for name in SMALL_FILES if name in files}
    placements = [one for path in shapes for one in _placements(source, path, manifest["parameters"][path]["dtype"])]
    tensors = [placement.tensor for placement in placements]
    checksums = manifest.get("checksums", {})
    return ForeignModel(
        source=source,
        config=config,
        configured_mtp_layers=config.num_nextn_predict_layers,
        tensors={tensor.name: tensor for tensor in tensors},
        headers={tensor.file: Header([tensor], {}, 0) for tensor in tensors},
        small_files=small_files,
        fingerprint={
            "shards": {
                tensor.file: {"bytes": tensor.nbytes, "header": checksums.get(tensor.file)} for tensor in tensors
            },
            "small_files": {name: zlib.crc32(content) for name, content in small_files.items()},
        },
        hint="",
        placements=placements,
        origin={name: manifest[name] for name in _ORIGIN if name in manifest},
    )


def _placements(source: Source, path: str, dtype: str) -> Iterator[Placement]:
    array = source.read_json(f"{STATE}/{path}/.zarray")
    if array["compressor"] is not None or array["order"] != "C":
        raise UserError(f"{source.name}: {path} is not stored as plain numbers; convert again from its own source")
    shape, chunk = array["shape"], array["chunks"]
    cut = max((axis + 1 for axis, (n, part) in enumerate(zip(shape, chunk, strict=True)) if part < n), default=0)
    counts = [-(-n // part) for n, part in zip(shape, chunk, strict=True)]
    for position in itertools.product(*map(range, counts)):
        block = tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(position, chunk, shape, strict=True))
        here = tuple(part.stop - part.start for part in block)
        key = ".".join(map(str, position))
        nbytes = math.prod(here) * np.dtype(FLOAT_DTYPES[_DTYPE_NAMES[dtype]]).itemsize
        tensor = StoredTensor(f"{path}/{key}", _DTYPE_NAMES[dtype], here, f"{STATE}/{path}/{key}", 0, nbytes)
        yield Placement(tensor, path, (block[:cut],), transposed=False)
