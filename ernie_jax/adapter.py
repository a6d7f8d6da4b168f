"""Adapter directories: what low-rank training saves, to be used with the checkpoint that it was trained on.

    adapter.json          written last: rank, scale, targets, and which model it is for
    adapter.safetensors   float32, dotted paths as in the model: NAME.lora_a and NAME.lora_b, the latter unscaled

Paths are local or gs://.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
from flax import nnx
from safetensors import SafetensorError

from ernie_jax import checkpoint
from ernie_jax.config import read_json
from ernie_jax.errors import UserError
from ernie_jax.lora import LoRA
from ernie_jax.model import Ernie
from ernie_jax.model.adapters import DOWN, UP, add, axes, declare, targeted
from ernie_jax.paths import storage_path
from ernie_jax.sharding import Layout, single, whole

FORMAT = "ernie_jax adapter"
VERSION = 1
_MANIFEST, _ARRAYS = "adapter.json", "adapter.safetensors"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter in host memory.

    Attributes:
      model: identity of the model that it is for.
      source: where that came from, for people.
      arrays: float32, by dotted path; b unscaled.
      digest: of its content.
    """

    lora: LoRA
    model: str
    source: str
    arrays: dict[str, np.ndarray]
    digest: str = ""


def is_adapter(directory: str | os.PathLike) -> bool:
    """Tell whether a directory holds a finished adapter."""
    return (storage_path(directory) / _MANIFEST).exists()


def save(directory: str | os.PathLike, adapter: Adapter) -> None:
    """Write an adapter; an unfinished one may be there already."""
    directory = storage_path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    content = safetensors.numpy.save(adapter.arrays)
    (directory / _ARRAYS).write_bytes(content)
    fields = {
        "format": FORMAT,
        "version": VERSION,
        **dataclasses.asdict(adapter.lora),
        "model": adapter.model,
        "source": adapter.source,
        "digest": hashlib.sha256(content).hexdigest(),
    }
    (directory / _MANIFEST).write_text(json.dumps(fields, indent=1) + "\n")


def load(directory: str | os.PathLike) -> Adapter:
    """Read an adapter.

    Raises:
      UserError: if the directory holds none, or one that is damaged or of another format.
    """
    directory = storage_path(directory)
    if not is_adapter(directory):
        raise UserError(f"{directory}: not an adapter (no {_MANIFEST}); `main.py train` with lora_rank makes one")
    fields = read_json(directory / _MANIFEST)
    if (fields.get("format"), fields.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{directory / _MANIFEST}: not an adapter of version {VERSION}, the one this release reads")
    try:
        content = (directory / _ARRAYS).read_bytes()
        arrays = safetensors.numpy.load(content)
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{directory / _ARRAYS}: missing or damaged ({error})") from None
    if hashlib.sha256(content).hexdigest() != fields["digest"]:
        raise UserError(f"{directory / _ARRAYS}: is not the file that {_MANIFEST} describes; copy the adapter again")
    lora = LoRA(**{field.name: fields[field.name] for field in dataclasses.fields(LoRA)})
    return Adapter(lora, fields["model"], fields["source"], arrays, fields["digest"])


def identity(model: Ernie, manifest: dict) -> str:
    """Return what tells a model from others: the same in all dtypes and quantised forms, another once merged.

    It is made of the norms and the routers' biases, which no form rounds and full training moves, and of the adapters
    that were merged into it.
    """
    leaves = nnx.to_flat_state(nnx.state(model))
    return fingerprint({".".join(map(str, path)): leaf.get_value() for path, leaf in leaves}, manifest)


def fingerprint(weights: Mapping[str, jax.Array], manifest: dict) -> str:
    """Return the identity of the model with these weights, by dotted path."""
    told = hashlib.sha256(json.dumps(manifest.get("merged", [])).encode())
    for name, leaf in sorted(weights.items()):
        if ("norm" in name or name.endswith("correction_bias")) and not name.startswith("mtp."):
            told.update(f"{name} {leaf.shape}".encode())
            told.update(whole(leaf).astype(ml_dtypes.bfloat16).tobytes())
    return told.hexdigest()


def check(adapter: Adapter, model: Ernie, manifest: dict, where: str) -> None:
    """Check that an adapter is for a model.

    Raises:
      UserError: if it is for another.
    """
    if adapter.model != identity(model, manifest):
        raise UserError(
            f"{where}: this adapter is for another model, {adapter.source}; give that as --model, or the same model in "
            "another dtype or quantised"
        )


def attach(model: Ernie, adapter: Adapter, layout: Layout, dtype: jnp.dtype) -> None:
    """Put an adapter beside the weights, which stay as they are: quantised ones too."""
    declare(model, adapter.lora, dtype)
    for path, linear in targeted(model, adapter.lora.targets):
        for name, array in zip((DOWN, UP), _scaled(adapter, path), strict=True):
            leaf = getattr(linear, name)
            leaf.set_value(layout.put(array.astype(dtype), leaf.get_metadata("axes")))


def merge(model: Ernie, adapter: Adapter, layout: Layout) -> None:
    """Add an adapter to the weights, in float32 and rounded once; each weight takes the place of its old self.

    Raises:
      UserError: if the weights are quantised.
    """
    if model.config.quantize:
        raise UserError(
            f"the weights are rounded to {model.config.quantize}, and no adapter can be added to such; merge with the "
            "checkpoint in bfloat16, or use --adapter"
        )
    for path, linear in targeted(model, adapter.lora.targets):
        down, up = (layout.put(array, named) for array, named in zip(_scaled(adapter, path), axes(linear), strict=True))
        weight = linear.weight.get_value()
        linear.weight.set_value(_adder(weight.sharding)(weight, down, up))


@functools.cache
def _adder(sharding):
    return jax.jit(add, donate_argnums=0, out_shardings=sharding)


def _scaled(adapter: Adapter, path: str) -> tuple[np.ndarray, np.ndarray]:
    return adapter.arrays[f"{path}.{DOWN}"], adapter.arrays[f"{path}.{UP}"] * np.float32(adapter.lora.scale)


def merge_checkpoint(model: str, directory: str, target: str) -> None:
    """Write the checkpoint that a converted checkpoint becomes when an adapter is added to its weights.

    Raises:
      UserError: if the adapter is for another model, the weights are quantised, or the target is not empty.
    """
    adapter, manifest, layout = load(directory), checkpoint.read_manifest(model), single()
    checkpoint.check_empty(storage_path(target))
    loaded = checkpoint.restore(model, layout, progress=True)
    check(adapter, loaded, manifest, directory)
    merge(loaded, adapter, layout)
    files = checkpoint.read_small_files(model)
    merged = [*manifest.get("merged", []), adapter.digest]
    checkpoint.save(target, loaded, files, f"{manifest['source']} with the adapter {directory}", merged)
