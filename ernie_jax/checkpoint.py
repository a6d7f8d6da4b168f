"""Checkpoints: a self-contained directory, restored straight into shards.

    manifest.json    written last: a directory without it is not finished
    config.json      Hugging Face's, verbatim; beside it generation_config.json, tokenizer files, chat template
    params/          an Orbax checkpoint of the nested parameter tree, keys as in `model.parameter_specs`

Paths are local or gs://.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from ernie_jax import distributed
from ernie_jax.config import ModelConfig, read_json
from ernie_jax.errors import UserError
from ernie_jax.model import Ernie
from ernie_jax.paths import storage_path
from ernie_jax.sharding import Layout, shard_abstract

FORMAT = "ernie_jax"
VERSION = 1
MANIFEST = "manifest.json"
PARAMS = "params"
# Everything beside the weights that makes a checkpoint self-contained; those that a source has are copied verbatim.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "float16": jnp.float16}
_READ_BYTES = 1 << 30  # read at the same time
_GROUP_BYTES = 2 << 30  # restored between two updates of the progress bar
_LISTED_AT_ONCE = 16  # folders of parameters


def parse_dtype(name: str) -> jnp.dtype:
    """Return the dtype of a --dtype flag or a manifest."""
    if name not in _DTYPES:
        raise UserError(f"dtype {name!r} is not one of {', '.join(_DTYPES)}")
    return jnp.dtype(_DTYPES[name])


def is_checkpoint(directory: str | os.PathLike) -> bool:
    """Tell whether a directory holds a finished ernie_jax checkpoint."""
    return (storage_path(directory) / MANIFEST).exists()


def read_manifest(directory: str | os.PathLike) -> dict:
    """Read and check manifest.json.

    Raises:
      UserError: if the directory is missing, unfinished, foreign, or of a newer format.
    """
    directory = storage_path(directory)
    if not directory.exists():
        raise UserError(f"{directory}: no such directory")
    if not is_checkpoint(directory):
        unfinished = (directory / PARAMS).exists()
        again, first = "run the same convert command again to finish it", "run `main.py convert` first"
        hint = again if unfinished else first
        raise UserError(f"{directory}: not an ernie_jax checkpoint (no {MANIFEST}); {hint}")
    manifest = read_json(directory / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{directory / MANIFEST}: format is {manifest.get('format')!r}, expected {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{directory / MANIFEST}: format version {manifest.get('version')} is not {VERSION}, the one this release "
            "reads; convert the model again or update ernie_jax"
        )
    return manifest


def read_config(directory: str | os.PathLike) -> ModelConfig:
    """Read the ModelConfig of a checkpoint; the manifest tells what depends on the weights that it has."""
    manifest = read_manifest(directory)
    config = ModelConfig.from_file(storage_path(directory) / "config.json")
    return dataclasses.replace(
        config,
        num_nextn_predict_layers=manifest["num_nextn_predict_layers"],
        quantize=manifest.get("quantize"),
        quantize_embedding=manifest.get("quantize_embedding", False),
    )


def restore(
    directory: str | os.PathLike, layout: Layout, dtype: jnp.dtype | None = None, progress: bool = False
) -> Ernie:
    """Load a checkpoint into the shards of a layout, whatever layout it was written from; each device reads its own.

    Args:
      dtype: of the weights; default: the checkpoint's own. Router tensors stay float32, quantised weights quantised.
      progress: show a bar with GB/s and time left.

    Raises:
      UserError: if the directory is no finished checkpoint, its parameters do not fit its config, or files of them are
        missing.
    """
    manifest = read_manifest(directory)
    model = Ernie(read_config(directory), dtype or parse_dtype(manifest["dtype"]))
    abstract = nnx.to_flat_state(shard_abstract(nnx.state(model), layout))
    stored = manifest["parameters"]
    check_parameters(str(directory), {_dotted(p): v.get_value().shape for p, v in abstract}, stored)
    check_files(storage_path(directory), [_dotted(path) for path, _ in abstract])

    context = ocp.Context()
    largest = max(_nbytes(v.get_value()) for _, v in abstract)
    context.memory.read_concurrent_bytes = max(_READ_BYTES, 2 * largest)  # Orbax refuses larger arrays
    total = sum(_nbytes(v.get_value()) for _, v in abstract)
    filled = []
    with (
        context,
        tqdm(total=total, unit="B", unit_scale=True, desc="restore", disable=not progress, mininterval=0.5) as bar,
    ):
        for group in _groups(abstract):
            tree = {tuple(map(str, path)): variable.get_value() for path, variable in group}
            skipped = {tuple(name.split(".")): ocp.PLACEHOLDER for name in stored}
            arrays = nnx.traversals.flatten_mapping(
                ocp.load(storage_path(directory) / PARAMS, nnx.traversals.unflatten_mapping(skipped | tree))
            )
            filled += [(path, variable.replace(arrays[tuple(map(str, path))])) for path, variable in group]
            bar.update(sum(_nbytes(v.get_value()) for _, v in group))
    nnx.update(model, nnx.from_flat_state(filled))
    return model


def read_small_files(directory: str | os.PathLike) -> dict[str, bytes]:
    """Read those SMALL_FILES that a directory has."""
    directory = storage_path(directory)
    return {name: (directory / name).read_bytes() for name in SMALL_FILES if (directory / name).exists()}


def check_empty(directory: epath.Path) -> None:
    """Check that a checkpoint can be written to a directory.

    Raises:
      UserError: if it exists and is not empty.
    """
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory}: exists and is not empty; choose another directory or delete it")


def save(
    directory: str | os.PathLike,
    model: Ernie,
    small_files: dict[str, bytes],
    source: str,
    merged: Sequence[str] = (),
) -> None:
    """Write a model as a finished checkpoint; the manifest comes last. Every process of several writes its shards.

    Args:
      small_files: contents of config.json, which must be there, and of other SMALL_FILES.
      source: where the weights come from, for the manifest.
      merged: digests of the adapters that were added to them.

    Raises:
      UserError: if the directory exists and is not empty.
    """
    directory = storage_path(directory)
    if distributed.is_primary():
        check_empty(directory)
        directory.mkdir(parents=True, exist_ok=True)
    distributed.barrier(f"{directory} is there")
    flat = {tuple(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_zarr3 = False
    context.array.saving.use_compression = False
    with context:
        ocp.save(directory / PARAMS, nnx.traversals.unflatten_mapping(flat))
    if not distributed.is_primary():
        return
    for name, content in small_files.items():
        (directory / name).write_bytes(content)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "source": source,
        "dtype": str(model.embed.dtype),
        "quantize": model.config.quantize,
        "quantize_embedding": model.config.quantize_embedding,
        "num_nextn_predict_layers": model.config.num_nextn_predict_layers,
        "merged": list(merged),
        "parameters": {
            ".".join(path): {"shape": list(x.shape), "dtype": str(x.dtype), "bytes": _nbytes(x)}
            for path, x in flat.items()
        },
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1))


def check_parameters(directory: str, expected: dict[str, tuple], stored: dict[str, dict]) -> None:
    """Check that a manifest lists parameters of the shapes expected.

    Raises:
      UserError: if it does not.
    """
    problems = [f"missing {name}" for name in expected if name not in stored]
    problems += [f"unexpected {name}" for name in stored if name not in expected]
    problems += [
        f"{name} is {tuple(stored[name]['shape'])}, expected {shape}"
        for name, shape in expected.items()
        if name in stored and tuple(stored[name]["shape"]) != shape
    ]
    if problems:
        raise UserError(f"{directory}: parameters do not fit config.json: {'; '.join(problems)}")


def check_files(directory: epath.Path, names: list[str]) -> None:
    """Check that every chunk of the parameters is there: a missing one would be read as zeros, without a word.

    Raises:
      UserError: if one is not.
    """

    def missing(name: str) -> list[str]:
        folder = directory / PARAMS / "state" / name
        if not (folder / ".zarray").exists():
            return [".zarray"]
        array = read_json(folder / ".zarray")
        counts = [-(-length // chunk) for length, chunk in zip(array["shape"], array["chunks"], strict=True)]
        keys = (".".join(map(str, position)) for position in itertools.product(*map(range, counts)))
        there = {entry.name for entry in folder.iterdir()}
        return [key for key in keys if key not in there]

    with ThreadPoolExecutor(_LISTED_AT_ONCE) as pool:
        lacking = {name: files for name, files in zip(names, pool.map(missing, names), strict=True) if files}
    if lacking:
        name, files = next(iter(lacking.items()))
        more = ", ..." if len(files) > 3 else ""
        others = f" and {len(lacking) - 1} more parameters" if len(lacking) > 1 else ""
        raise UserError(
            f"{directory}: parameter {name} lacks {len(files)} of its files ({', '.join(files[:3])}{more}){others}; "
            "copy the checkpoint again or convert again"
        )


def _groups(leaves: list[tuple[tuple, nnx.Variable]]) -> Iterator[list[tuple[tuple, nnx.Variable]]]:
    group, size = [], 0
    for leaf in leaves:
        group.append(leaf)
        size += _nbytes(leaf[1].get_value())
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def _nbytes(x) -> int:
    return int(np.prod(x.shape)) * jnp.dtype(x.dtype).itemsize
