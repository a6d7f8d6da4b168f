"""convert: a foreign checkpoint becomes ours, streaming through a few chunks of memory."""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import itertools
import os
import pathlib
import queue
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from convert.calibration import Calibration, Stage, memory, read_text
from convert.chunks import CHUNK_BYTES, Chunk, Rounding, nearest, plan_parameters
from convert.converted import read_foreign_or_ours
from convert.resources import check_free, explain_disk_errors, thread_count
from convert.shards import TensorReader
from convert.source import ForeignModel, Source, read_model
from convert.table import parameter_dtypes
from convert.target import JOURNAL, Target, chunk_name
from ernie_jax import distributed
from ernie_jax.checkpoint import parse_dtype
from ernie_jax.config import ModelConfig
from ernie_jax.distributed import say
from ernie_jax.errors import UserError
from ernie_jax.model import parameter_specs
from ernie_jax.paths import is_local, storage_path

# What is journaled at once. While one group is brought to the disk the next is written: a conversion that is killed
# writes at most these two again.
GROUP_BYTES = 256 << 20
_GROUP_FILES = 64  # all open until they are on the disk
_SPARE_DISK_BYTES = 64 << 20  # metadata, small files


def convert(
    source: str,
    target: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    quantize_embedding: bool = False,
    calibration: str | None = None,
    host_memory_gb: float = 4.0,
    overwrite: bool = False,
    keep_download: bool = False,
) -> None:
    """Convert a Hugging Face (or Paddle) checkpoint to a self-contained ernie_jax checkpoint.

    An unfinished target of the same source and options goes on where it was. Processes of a team (`distributed.start`)
    that call this together each convert a part.

    Args:
      source: a directory, local or gs://, or a hub id. With `quantize` it may be a checkpoint of ours, not quantised.
      target: the directory to write, local or gs://.
      revision: branch, tag or commit of a hub id.
      dtype: "bfloat16", "float32" or "float16" for everything but the router; default: each tensor's own.
      quantize: "int8", "fp8" or "int4" for the weights of attention, MLPs and experts; default: they are as `dtype`
        says.
      quantize_embedding: whether then token embedding and output head become int8.
      calibration: a text, by which weights are rounded so that the errors make up for each other (see `calibration`);
        default: each weight is rounded to the nearest number.
      host_memory_gb: how much anonymous memory to use at most, in each process.
      overwrite: replace a checkpoint that is at the target, finished or not.
      keep_download: leave the shards of a hub id in Hugging Face's cache; by default each is deleted once written.

    Raises:
      UserError: on a source that is no intact ERNIE 4.5 text model, a target that may not be written, a full disk.
    """
    requested = parse_dtype(dtype) if dtype is not None else None
    if calibration is not None:
        _check_calibration(calibration, quantize)
    origin = Source(source, revision, keep_download)
    model = read_foreign_or_ours(origin) if quantize else read_model(origin)
    config = dataclasses.replace(model.config, quantize=quantize, quantize_embedding=quantize_embedding)
    placements, ignored = model.place(config)
    shapes = {path: spec.shape for path, spec in parameter_specs(config).items()}
    parameters = plan_parameters(placements, shapes, parameter_dtypes(config, placements, requested))
    _say_what_is_odd(model, ignored)
    text, needs = None, (0, 0)
    if calibration is not None:
        text = read_text(calibration, model)
        needs = memory(text, config, parameters)
        say(f"{calibration}: calibrating on {text.tokens:,} tokens")
    threads = thread_count(host_memory_gb, *needs)

    shards = {file: [fields["bytes"], fields["header"]] for file, fields in model.fingerprint["shards"].items()}
    distributed.agree({f"the content of --source={source}": [shards, model.fingerprint["small_files"]]})
    plan = {"source": source, "revision": origin.revision, "dtype": dtype, "quantize": quantize}
    plan["chunk_bytes"] = CHUNK_BYTES
    if quantize_embedding:
        plan["quantize_embedding"] = True
    if text:
        plan["calibration"] = text.digest
    out = Target(storage_path(target), plan | model.fingerprint, overwrite)
    remaining = [chunk for parameter in parameters if parameter.runs for chunk in parameter.chunks()]
    total = sum(chunk.written_bytes for chunk in remaining)
    remaining = [chunk for chunk in remaining if chunk_name(chunk) not in out.checksums]
    todo = sum(chunk.written_bytes for chunk in remaining)
    # By the last shard that each needs, so that a shard can be released before the next but one is fetched.
    rank = {file: position for position, file in enumerate(model.headers)}
    remaining.sort(key=lambda chunk: max(rank[file] for file in chunk.sources()))
    with out, _staging(out) as staging, explain_disk_errors(out.path, "it goes on where it was"):
        _check_disk(out, todo, model, staging)
        if out.is_resumed:
            say(f"{target}: resuming at {(total - todo) / 1e9:.2f} of {total / 1e9:.2f} GB")
        out.begin()
        out.add_parameters(parameters)
        with _Progress(total, total - todo) as progress:
            chunks = _part(remaining)
            stages = Calibration(text, config, out.path).stages(chunks) if text else [Stage(chunks, nearest)]
            _write_chunks(chunks, stages, out, origin, staging, threads, progress)
        facts = _facts(model, requested, config, ignored, parameters)
        out.finish(parameters, model.small_files, facts | ({"calibration": text.digest} if text else {}))


def _check_calibration(path: str, quantize: str | None) -> None:
    if quantize is None:
        raise UserError(f"--calibration={path} is for --quantize; give a form or leave it out")
    if (count := distributed.process_count()) > 1:
        raise UserError(f"--calibration={path} takes one process, as layer comes after layer, and here are {count}")


class _Progress:
    """A bar in process 0 that counts the bytes of all processes."""

    def __init__(self, total: int, done: int):
        hidden = not distributed.is_primary()
        self._bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc="convert", disable=hidden)

    def add(self, nbytes: int) -> None:
        if distributed.is_primary():
            self._bar.update(nbytes + sum(distributed.take_reports()))
        else:
            distributed.report(nbytes)

    def say(self, what: str) -> None:
        self._bar.set_description(f"convert, {what}" if what else "convert")

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, exception: type | None, *_) -> None:
        while exception is None and distributed.is_primary() and self._bar.n < self._bar.total:
            self._bar.update(sum(distributed.take_reports(wait=True)))
        self._bar.close()


def _part(chunks: list[Chunk]) -> list[Chunk]:
    """Choose the chunks of this process: consecutive ones, which come from few shards, of about the same bytes."""
    index, count = distributed.process_index(), distributed.process_count()
    ends = list(itertools.accumulate(chunk.written_bytes for chunk in chunks))
    first, last = (bisect.bisect_right(ends, ends[-1] * i // count) if ends else 0 for i in (index, index + 1))
    return chunks[first:last]


def _write_chunks(
    chunks: list[Chunk],
    stages: Iterable[Stage],
    target: Target,
    source: Source,
    staging: pathlib.Path,
    threads: int,
    progress: _Progress,
) -> None:
    """Write chunks, which are those of the stages, group by group, journaling each while the next is being written."""
    buffers: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
    for _ in range(threads if chunks else 0):
        buffers.put(np.empty(max(chunk.buffer_bytes for chunk in chunks), np.uint8))
    uses = collections.Counter(file for chunk in chunks for file in chunk.sources())

    with TensorReader() as reader, ThreadPoolExecutor(threads) as pool:

        def write(chunk: Chunk, rounding: Rounding):
            buffer = buffers.get()
            try:
                return [target.write(part, contents) for part, contents in chunk.fill(reader, buffer, rounding)]
            finally:
                buffers.put(buffer)

        def commit(group: list[Chunk], written: list[Future]) -> None:
            target.commit([file for future in written for file in future.result()])
            progress.add(sum(chunk.written_bytes for chunk in group))
            for file in (file for chunk in group for file in chunk.sources()):
                uses[file] -= 1
                if uses[file] == 0:
                    reader.close(file)
                    source.release(file, staging)

        opened: set[str] = set()
        pending: collections.deque = collections.deque()
        try:
            for stage in stages:
                progress.say(stage.label)
                for group in _groups(stage.chunks):
                    for file in sorted(set().union(*(chunk.sources() for chunk in group)) - opened):
                        reader.open(file, source.fetch(file, staging))
                        opened.add(file)
                    pending.append((group, [pool.submit(write, chunk, stage.rounding) for chunk in group]))
                    if len(pending) == 2:
                        commit(*pending.popleft())
                while pending:
                    commit(*pending.popleft())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _groups(chunks: list[Chunk]) -> Iterator[list[Chunk]]:
    group, size = [], 0
    for chunk in chunks:
        group.append(chunk)
        size += chunk.written_bytes
        if size >= GROUP_BYTES or len(group) == _GROUP_FILES:
            yield group
            group, size = [], 0
    if group:
        yield group


@contextlib.contextmanager
def _staging(target: Target) -> Iterator[pathlib.Path]:
    """Provide the folder into which a remote source's shards are fetched: in the target if that is local."""
    if is_local(target.path):
        yield pathlib.Path(target.path) / JOURNAL / f"download-{distributed.process_index()}"
    else:
        with tempfile.TemporaryDirectory(prefix="ernie_jax-") as folder:
            yield pathlib.Path(folder)


def _check_disk(target: Target, todo: int, model: ForeignModel, staging: pathlib.Path) -> None:
    """Check that what is still to be written fits, with the two shards that may lie fetched for each process."""
    sizes = sorted(shard["bytes"] for shard in model.fingerprint["shards"].values())
    fetched = sum(sizes[-2:]) if model.source.is_remote else 0
    if not is_local(target.path):
        check_free(staging, fetched, "fetching two shards")
    elif distributed.is_primary():
        fetched *= distributed.process_count()
        check_free(target.path, todo + fetched + _SPARE_DISK_BYTES - _bytes_to_replace(target), "the checkpoint")


def _bytes_to_replace(target: Target) -> int:
    """Count the bytes that `Target.begin` will free: all that is there, unless it is resumed."""
    if target.is_resumed or not target.path.exists():
        return 0
    return sum(os.path.getsize(os.path.join(folder, f)) for folder, _, files in os.walk(target.path) for f in files)


def _say_what_is_odd(model: ForeignModel, ignored: list[str]) -> None:
    for name in ignored:
        say(f"{model.source.name}: ignoring {name}: the head is tied to the embedding")
    found, configured = model.config.num_nextn_predict_layers, model.configured_mtp_layers
    if found != configured:
        says = f"config.json says num_nextn_predict_layers = {configured}"
        say(f"{model.source.name}: {says}, the checkpoint has tensors of {found}; going by the tensors")


def _facts(
    model: ForeignModel, requested: np.dtype | None, config: ModelConfig, ignored: list[str], parameters: list
) -> dict:
    """Make the part of the manifest that says where the parameters come from, enough to export them as they were."""
    (embed,) = (parameter for parameter in parameters if parameter.path == "embed.weight")
    origin = model.origin
    if origin is None:
        origin = {
            "source": model.source.name,
            "revision": model.source.revision,
            "requested_dtype": None,
            "shards": {file: header.metadata for file, header in model.headers.items()},
            "tensors": {
                name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "file": tensor.file}
                for name, tensor in model.tensors.items()
            },
            "ignored": ignored,
        }
    own = {
        "dtype": np.dtype(requested or embed.runs[0].tensor.numpy_dtype).name,
        "quantize": config.quantize,
        "quantize_embedding": config.quantize_embedding,
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
    }
    return origin | own | ({"requested_dtype": requested.name} if requested else {})
