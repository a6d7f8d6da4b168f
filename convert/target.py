"""The target of a conversion: a checkpoint directory that is written in place and can be taken up again.

While it is unfinished it holds a folder .conversion/ with

    plan.json         what is being converted, and how
    group-I-N.json    the checksums of a group of chunks that process I has brought to the disk
    lock              held by all processes of the conversion

so that a conversion killed at any moment goes on after the last journaled groups, with as many processes as there are
then. manifest.json is written after everything else: a directory without it is not a checkpoint.

Of several processes, each writes its chunks and its journals, and process 0 all the rest.

The parameters are written as Orbax's own format (a directory of zarr v2 arrays, uncompressed, one file a chunk): its
saving functions need a whole array in memory, of which a 300B model has some of 7.5 GB. Loading goes through Orbax.
"""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import secrets
import time
import zlib
from typing import BinaryIO

import numpy as np
from etils import epath

from convert.chunks import Chunk, Parameter
from ernie_jax import distributed
from ernie_jax.checkpoint import FORMAT, MANIFEST, PARAMS, VERSION
from ernie_jax.config import read_json
from ernie_jax.errors import UserError
from ernie_jax.paths import is_local

JOURNAL = ".conversion"
STATE = f"{PARAMS}/state"
_PLAN = "plan.json"


class Target:
    """A directory in which a checkpoint is being written; as a context it lets the next writer in at its end."""

    def __init__(self, path: epath.Path, plan: dict, overwrite: bool):
        """Look at a target; nothing is touched yet. Process 0 looks for all.

        Args:
          plan: what to convert and how, JSON: an unfinished target goes on only under an equal plan.
          overwrite: replace a checkpoint, finished or not.

        Raises:
          UserError: if the target exists and may not be written.
        """
        self.path = path
        self.checksums: dict[str, str] = {}  # of the files that are done, by path within the target
        self._journal = path / JOURNAL
        self._plan = plan
        self._groups = 0
        self._lock: io.TextIOBase | None = None
        if distributed.is_primary():
            self._look(overwrite)
        self.checksums, self._groups = distributed.broadcast([self.checksums, self._groups])
        self._written: dict[str, str] = {}

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_) -> None:
        self._release()

    @property
    def is_resumed(self) -> bool:
        return bool(self.checksums)

    def begin(self) -> None:
        """Claim the directory, dropping what --overwrite replaces and what no journal vouches for.

        Raises:
          UserError: if another conversion has claimed it, or not all processes see it.
        """
        if distributed.is_primary():
            self._journal.mkdir(parents=True, exist_ok=True)
        token = secrets.token_hex(8)
        if is_local(self.path):
            if distributed.is_primary():
                self._claim(token)
            self._join(distributed.broadcast(token))
        if distributed.is_primary() and not self.is_resumed:
            for stale in self._journal.glob("group-*.json"):
                stale.unlink()
            _write_json(self._journal / _PLAN, self._plan)
            (self.path / MANIFEST).unlink(missing_ok=True)
            for entry in self.path.iterdir():
                if entry.name != JOURNAL:
                    entry.rmtree() if entry.is_dir() else entry.unlink()

    def add_parameters(self, parameters: list[Parameter]) -> None:
        """Make the arrays of the parameters, without their chunks."""
        if distributed.is_primary():
            for parameter in parameters:
                self._add(parameter)
        distributed.barrier("the arrays are there")

    def _add(self, parameter: Parameter) -> None:
        directory = self.path / STATE / parameter.path
        directory.mkdir(parents=True, exist_ok=True)
        known = parameter.dtype.isbuiltin == 1
        name = parameter.dtype.newbyteorder("<").str if known else parameter.dtype.name  # bfloat16, float8_e4m3fn
        array = {"zarr_format": 2, "shape": parameter.shape, "chunks": parameter.chunk_shape, "dtype": name}
        array |= {"order": "C", "dimension_separator": ".", "compressor": None, "filters": None, "fill_value": None}
        _write_json(directory / ".zarray", array)

    def write(self, chunk: Chunk, contents: np.ndarray) -> tuple[str, str, BinaryIO]:
        """Write the bytes of a chunk; returns its name, its checksum, and the file to hand to `commit`."""
        name = chunk_name(chunk)
        file = (self.path / name).open("wb")
        file.write(memoryview(contents))
        if is_local(self.path):
            file.flush()
        else:
            file.close()  # uploads it
        return name, checksum(contents), file

    def commit(self, written: list[tuple[str, str, BinaryIO]]) -> None:
        """Bring a group of chunks to the disk, then journal it."""
        for _, _, file in written:
            if is_local(self.path):
                os.fsync(file.fileno())
                file.close()
        group = {name: crc for name, crc, _ in written}
        _write_json(self._journal / f"group-{distributed.process_index()}-{self._groups:06}.json", group)
        self._groups += 1
        self._written |= group

    def finish(self, parameters: list[Parameter], small_files: dict[str, bytes], facts: dict) -> None:
        """Write Orbax's metadata, the small files and, last, the manifest; returns when all are there.

        Args:
          facts: what the manifest says beside format, parameters and checksums.
        """
        for written in distributed.gather(self._written):
            self.checksums |= written
        if distributed.is_primary():
            listed = {chunk_name(chunk) for parameter in parameters for chunk in parameter.chunks()}
            assert listed == set(self.checksums), f"chunks not written: {sorted(listed - set(self.checksums))[:10]}"
            self._describe(parameters, small_files, facts)
        self._release()
        distributed.barrier("the manifest is there")
        if distributed.is_primary():
            self._journal.rmtree()

    def _describe(self, parameters: list[Parameter], small_files: dict[str, bytes], facts: dict) -> None:
        _write_orbax_metadata(self.path / PARAMS, parameters)
        for name, content in small_files.items():
            _write(self.path / name, content)
            self.checksums[name] = checksum(content)
        described = {
            parameter.path: {"shape": parameter.shape, "dtype": parameter.dtype.name, "bytes": parameter.nbytes}
            for parameter in parameters
        }
        manifest = {"format": FORMAT, "version": VERSION} | facts
        manifest |= {"parameters": described, "checksums": dict(sorted(self.checksums.items()))}
        _write_json(self.path / MANIFEST, manifest)

    def _look(self, overwrite: bool) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"{self.path}: exists and is not a directory; choose another --target")
        entries = {entry.name for entry in self.path.iterdir()}
        unfinished = (self._journal / _PLAN).exists()
        if MANIFEST in entries and read_json(self.path / MANIFEST).get("format") == FORMAT:
            if not overwrite:
                raise UserError(f"{self.path}: exists, a finished checkpoint; pass --overwrite to replace it")
        elif entries - {JOURNAL} and not unfinished:
            raise UserError(f"{self.path}: exists and is not an ernie_jax checkpoint; choose another --target")
        elif unfinished and not overwrite:
            self._read_journal()

    def _claim(self, token: str) -> None:
        """Lock the directory against other conversions, and leave a token there for our own processes."""
        self._lock = open(self._journal / "lock", "a+")  # noqa: SIM115 (freed when the process ends, however it ends)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path}: another process is converting to it") from None
        self._lock.truncate(0)
        self._lock.write(token)
        self._lock.flush()
        os.fsync(self._lock.fileno())
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def _join(self, token: str) -> None:
        """Share process 0's lock: while any of its processes lives, a conversion keeps others out."""
        if distributed.is_primary():
            return
        try:
            self._lock = (self._journal / "lock").open()
        except FileNotFoundError:
            found = None
        else:
            found = self._lock.read()
            fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if found != token:
            raise UserError(
                f"{self.path} is not the same directory here and in process 0; --target must be one that all "
                "processes share, on a network disk or gs://"
            )

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _read_journal(self) -> None:
        found = read_json(self._journal / _PLAN)
        # The source may be spelled in another way; its files tell whether it is the same.
        if found | {"source": ""} != json.loads(json.dumps(self._plan)) | {"source": ""}:
            raise UserError(
                f"{self.path}: holds an unfinished conversion of {found.get('source')} with other files or options; "
                "repeat that one to finish it or pass --overwrite"
            )
        for journal in sorted(self._journal.glob("group-*.json")):
            self.checksums |= read_json(journal)
            self._groups = max(self._groups, int(journal.stem.rpartition("-")[2]) + 1)


def chunk_name(chunk: Chunk) -> str:
    """Return the path of a chunk's file within a checkpoint."""
    return f"{STATE}/{chunk.parameter.path}/{chunk.key}"


def checksum(content) -> str:
    """Return the crc32 of a file's bytes as in a manifest."""
    return f"{zlib.crc32(content):08x}"


def _write_json(path: epath.Path, value: dict) -> None:
    _write(path, json.dumps(value, indent=1).encode())


def _write(path: epath.Path, content: bytes) -> None:
    """Write a small file so that it is whole or not there, and on the disk."""
    if not is_local(path):
        path.write_bytes(content)  # objects appear when they are complete
        return
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _write_orbax_metadata(directory: epath.Path, parameters: list[Parameter]) -> None:
    """Make the arrays under `directory`/state an Orbax checkpoint of the nested tree that their dotted paths spell.

    Source: the files that orbax-checkpoint 0.12.8 writes for jax arrays without OCDBT and zarr v3.
    """
    tree, shardings, arrays = {}, {}, []
    sharding = json.dumps({"sharding_type": "SingleDeviceSharding", "device_str": "cpu:0"})
    for parameter in parameters:
        keys = tuple(parameter.path.split("."))
        shape = list(parameter.shape)
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": shape},
        }
        shardings[base64.b64encode(parameter.path.encode()).decode()] = sharding
        described = {"param_name": parameter.path, "write_shape": shape, "chunk_shape": list(parameter.chunk_shape)}
        arrays.append({"array_metadata": described | {"ext_metadata": None}})
    now = time.time_ns()
    formats = {"use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    state = directory / "state"
    (state / "array_metadatas").mkdir(parents=True, exist_ok=True)
    _write_json(state / "array_metadatas" / "process_0", {"array_metadatas": arrays})
    _write_json(state / "_sharding", shardings)
    _write_json(state / "_METADATA", {"tree_metadata": tree, "custom_metadata": None} | formats)
    handler = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
    checkpoint = {"item_handlers": {"state": handler}, "metrics": {}, "performance_metrics": {}, "custom_metadata": {}}
    checkpoint |= {"init_timestamp_nsecs": now, "commit_timestamp_nsecs": now}
    _write_json(directory / "_CHECKPOINT_METADATA", checkpoint)
    for marker in ("orbax.checkpoint", "commit_success.txt"):
        _write(directory / marker, b"")
