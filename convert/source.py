"""Where a foreign checkpoint comes from: a directory (local or gs://) or a Hugging Face hub id.

Headers and small files are read where they lie. A shard is read from the local disk: that of a remote source is
fetched when its first tensor is due and released after its last, so that one or two lie there at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from convert.shards import Header, StoredTensor, read_header
from convert.table import Placement, count_mtp_layers, place
from ernie_jax.checkpoint import MANIFEST, SMALL_FILES
from ernie_jax.config import ModelConfig, read_json
from ernie_jax.errors import UserError
from ernie_jax.paths import is_local, storage_path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HEADER_READERS = 8


def is_hub_id(source: str) -> bool:
    """Tell whether a source is a Hugging Face hub id (OWNER/NAME) rather than a path."""
    return _HUB_ID.fullmatch(source) is not None and not pathlib.Path(source).exists()


class Source:
    """The files of a foreign checkpoint.

    Attributes:
      name: as the user gave it.
      revision: the commit of a hub source.
    """

    def __init__(self, source: str, revision: str | None = None, keep_download: bool = False):
        """Find a source.

        Args:
          revision: branch, tag or commit of a hub source; default: the head of its main branch.
          keep_download: leave the shards of a hub source in Hugging Face's cache.

        Raises:
          UserError: if there is no such directory or hub model.
        """
        self.name = source
        self.revision: str | None = None
        self._hub_id = source if is_hub_id(source) else None
        self._keep = keep_download
        if self._hub_id:
            with self._errors("no such directory, and "):
                self.revision = HfApi().model_info(source, revision=revision).sha
            self.root = epath.Path(f"hf://{source}@{self.revision}")
            return
        if revision is not None:
            raise UserError(f"--revision={revision}: only a hub id has revisions, {source} is a directory")
        self.root = storage_path(source)
        if not self.root.is_dir():
            raise UserError(f"{source}: no such directory, and not a hub id (OWNER/NAME)")

    @property
    def is_remote(self) -> bool:
        return not is_local(self.root)

    def files(self) -> dict[str, dict]:
        """List the files at the top: bytes and time of the last change of each, as exact as the storage has it."""

        def describe(entry: epath.Path) -> dict:
            if self.is_remote:
                stat = entry.stat()
                return {"bytes": stat.length, "modified": stat.mtime}
            stat = os.stat(entry)
            return {"bytes": stat.st_size, "modified": stat.st_mtime_ns}

        with self._errors():
            return {entry.name: describe(entry) for entry in self.root.iterdir() if not entry.is_dir()}

    def read_bytes(self, file: str) -> bytes:
        with self._errors():
            return (self.root / file).read_bytes()

    def read_json(self, file: str) -> dict:
        with self._errors():
            return read_json(self.root / file)

    def read_header(self, file: str, size: int) -> Header:
        with self._errors(), (self.root / file).open("rb") as opened:
            return read_header(opened, size, file, f"{self.name}/{file}")

    def fetch(self, file: str, staging: pathlib.Path) -> str:
        """Return a local path of a shard, downloading it to the folder `staging` if need be."""
        if not self.is_remote:
            return str(self.root / file)
        with self._errors():
            if self._hub_id:
                cached = try_to_load_from_cache(self._hub_id, file, revision=self.revision)
                if isinstance(cached, str):
                    return cached
                folder = None if self._keep else staging
                return hf_hub_download(self._hub_id, file, revision=self.revision, local_dir=folder)
            (staging / file).parent.mkdir(parents=True, exist_ok=True)
            with (self.root / file).open("rb") as remote, (staging / file).open("wb") as local:
                shutil.copyfileobj(remote, local, 16 << 20)
            return str(staging / file)

    def release(self, file: str, staging: pathlib.Path) -> None:
        """Delete what `fetch` downloaded to the staging folder."""
        (staging / file).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self, besides: str = "") -> Iterator[None]:
        """Turn a refusal of the disk or of the hub, or its silence, into a UserError."""
        try:
            yield
        except PermissionError as error:
            raise UserError(f"{error.filename or self.name}: {error.strerror or error}") from None
        except GatedRepoError:
            raise UserError(f"{self.name}: the hub asks you to accept its licence and to run `hf auth login`") from None
        except RevisionNotFoundError:
            raise UserError(f"{self.name}: the hub model has no such revision") from None
        except RepositoryNotFoundError:
            raise UserError(f"{self.name}: {besides}no such model on the Hugging Face hub") from None
        except (HTTPError, OSError) as error:
            if not self._hub_id or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self.name}: {besides}the Hugging Face hub does not answer ({reason})") from None


@dataclasses.dataclass(frozen=True)
class ForeignModel:
    """What a source holds, headers only.

    Attributes:
      config: with as many multi-token-prediction layers as there are tensors of.
      tensors: by name, in the order of the shards and of their bytes.
      headers: of each shard.
      small_files: contents of those of SMALL_FILES that there are.
      fingerprint: changes when the source does.
      hint: what to add to a sentence about missing tensors.
      placements: of tensors that are the chunks of a checkpoint of ours; None: the table of names tells.
      origin: what such a checkpoint says of where it comes from.
    """

    source: Source
    config: ModelConfig
    configured_mtp_layers: int
    tensors: dict[str, StoredTensor]
    headers: dict[str, Header]
    small_files: dict[str, bytes]
    fingerprint: dict
    hint: str
    placements: list[Placement] | None = None
    origin: dict | None = None

    def place(self, config: ModelConfig) -> tuple[list[Placement], list[str]]:
        """Find the place of every tensor in the parameters of `config`, as `table.place` does."""
        if self.placements is not None:
            return self.placements, []
        return place(config, self.tensors, self.source.name, self.hint)


def read_model(source: Source) -> ForeignModel:
    """Read everything but the tensors of a source, and check that its files agree.

    Raises:
      UserError: if it is no ERNIE 4.5 text model, or a file is missing, truncated or damaged.
    """
    files = source.files()
    if MANIFEST in files and not {INDEX, SINGLE} & set(files):
        raise UserError(f"{source.name}: already converted; pass a Hugging Face directory or hub id")
    if "config.json" not in files:
        raise UserError(f"{source.name}: not a model directory (no config.json)")
    small_files = {name: source.read_bytes(name) for name in SMALL_FILES if name in files}
    config = ModelConfig.from_hf(source.read_json("config.json"), f"{source.name}/config.json")

    weight_map = _read_index(source, files)
    shards = sorted(set(weight_map.values())) if weight_map else [SINGLE]
    if absent := [shard for shard in shards if shard not in files]:
        raise UserError(f"{source.name}: missing shard{'s' * (len(absent) > 1)} {', '.join(absent)}; download again")
    with ThreadPoolExecutor(_HEADER_READERS) as pool:
        found = pool.map(lambda shard: source.read_header(shard, files[shard]["bytes"]), shards)
    headers = dict(zip(shards, found, strict=True))
    tensors: dict[str, StoredTensor] = {}
    for header in headers.values():
        for tensor in header.tensors:
            if tensor.name in tensors:
                shards_of_it = f"{tensors[tensor.name].file} and {tensor.file}"
                raise UserError(f"{source.name}: tensor {tensor.name} is in both {shards_of_it}")
            tensors[tensor.name] = tensor
    if wrong := [name for name, shard in weight_map.items() if name not in tensors or tensors[name].file != shard]:
        where = f"{source.name}/{INDEX}"
        raise UserError(f"{where}: tensors not in the shard that it names: {', '.join(wrong[:100])}; download it again")

    unlisted = [file for file in files if file.endswith(".safetensors") and file not in shards]
    return ForeignModel(
        source=source,
        config=dataclasses.replace(config, num_nextn_predict_layers=count_mtp_layers(tensors)),
        configured_mtp_layers=config.num_nextn_predict_layers,
        tensors=tensors,
        headers=headers,
        small_files=small_files,
        fingerprint={
            "shards": {shard: files[shard] | {"header": headers[shard].crc32} for shard in shards},
            "small_files": {name: zlib.crc32(content) for name, content in small_files.items()},
        },
        hint=f" (not in {INDEX}: {', '.join(unlisted)})" if weight_map and unlisted else "",
    )


def _read_index(source: Source, files: dict[str, dict]) -> dict[str, str]:
    """Return the shard of each tensor as the index says; empty if the model is one file without an index."""
    if INDEX in files:
        weight_map = source.read_json(INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or {type(shard) for shard in weight_map.values()} != {str}:
            raise UserError(f"{source.name}/{INDEX}: no weight_map that names a shard for each tensor")
        return weight_map
    if SINGLE not in files:
        others = sorted(name for name in files if name.endswith((".safetensors", ".bin", ".pdparams", ".pt")))
        found = f"found only {', '.join(others)}" if others else "found no weights"
        raise UserError(f"{source.name}: neither {INDEX} nor {SINGLE}; {found}")
    return {}
