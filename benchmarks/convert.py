"""Time a conversion against a plain copy of the same bytes, and a restore.

    python -m benchmarks.convert --folder=/disk/to/measure

Writes a random checkpoint of ERNIE-4.5-21B-A3B's full width cut to --layers, then --runs times, one after the other so
that a varying disk is fair to both: a copy with fsync, and `python -m convert` in a fresh process. Both read from the
disk, not from the page cache. Everything is deleted at the end.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

import jax
import numpy as np
from absl import app, flags, logging
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from convert.shards import FLOAT_DTYPES, encode_header
from convert.source import INDEX
from convert.table import expand
from ernie_jax.config import ModelConfig, read_json

_FOLDER = flags.DEFINE_string("folder", None, "Where to work: twice the checkpoint's size must be free.", required=True)
_LAYERS = flags.DEFINE_integer("layers", 8, "Layers of the checkpoint: 8 make 11.5 GB.")
_RUNS = flags.DEFINE_integer("runs", 3, "How many times to copy and to convert.")
_PRESET = pathlib.Path(__file__).parents[1] / "configs" / "ernie-4.5-21b-a3b.json"
_SHARD_BYTES = 5_000_000_000


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every load
    folder = pathlib.Path(_FOLDER.value)
    source, copy, target = (folder / name for name in ("source", "copy", "target"))
    total = write_checkpoint(source, _LAYERS.value)
    copies, conversions, peaks, restores = [], [], [], []
    for _ in range(_RUNS.value):
        settle(source)
        copies.append(time_copy(source, copy))
        shutil.rmtree(copy)
        settle(source)
        seconds, peak = time_conversion(source, target)
        conversions.append(seconds)
        peaks.append(peak)
        settle(target)
        restores.append(time_restore(target))
        shutil.rmtree(target)
    shutil.rmtree(source)

    print(f"{total / 1e9:.2f} GB; seconds of each run, median, GB/s")
    for name, seconds in (("copy + fsync", copies), ("convert", conversions), ("ocp.load", restores)):
        median = statistics.median(seconds)
        print(f"{name:14}{' '.join(f'{s:6.1f}' for s in seconds)}  {median:6.1f}  {total / 1e9 / median:5.2f}")
    print(f"convert / copy {statistics.median(conversions) / statistics.median(copies):.2f}")
    print(f"peak anonymous memory of convert {max(peaks) / 1e9:.2f} GB")


def write_checkpoint(directory: pathlib.Path, layers: int) -> int:
    """Write a random Hugging Face checkpoint in shards; returns the bytes of its tensors."""
    fields = read_json(_PRESET) | {"num_hidden_layers": layers, "moe_layer_end_index": -1}
    fields["num_nextn_predict_layers"] = 0
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(fields))
    config = ModelConfig.from_hf(fields)
    shards: list[list[tuple]] = []
    total = 0
    for name, rule in expand(config).items():
        shape = next(iter(rule.shapes))
        dtype = "F32" if ".router." in rule.parameter else "BF16"
        if total >= len(shards) * _SHARD_BYTES:
            shards.append([])
        shards[-1].append((name, dtype, shape, math.prod(shape) * FLOAT_DTYPES[dtype].itemsize))
        total += shards[-1][-1][-1]
    rng = np.random.default_rng(0)
    weight_map = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="random checkpoint") as bar:
        for i, shard in enumerate(shards, 1):
            file = f"model-{i:05}-of-{len(shards):05}.safetensors"
            with (directory / file).open("wb") as out:
                out.write(encode_header(shard, {"format": "pt"}))
                for name, *_, nbytes in shard:
                    out.write(rng.bytes(nbytes))
                    weight_map[name] = file
                    bar.update(nbytes)
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


def settle(directory: pathlib.Path) -> None:
    """Bring everything to the disk and drop the directory's files from the page cache."""
    os.sync()
    for file in directory.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def time_copy(source: pathlib.Path, target: pathlib.Path) -> float:
    start = time.monotonic()
    target.mkdir()
    for file in source.iterdir():
        with file.open("rb") as read, (target / file.name).open("wb") as write:
            shutil.copyfileobj(read, write, 16 << 20)
            write.flush()
            os.fsync(write.fileno())
    return time.monotonic() - start


def time_conversion(source: pathlib.Path, target: pathlib.Path) -> tuple[float, int]:
    """Return the seconds of a conversion, start of the process included, and its peak anonymous memory in bytes."""
    start = time.monotonic()
    command = [sys.executable, "-m", "convert", f"--source={source}", f"--target={target}"]
    process = subprocess.Popen(command, cwd=_PRESET.parents[1])
    peak = 0
    while process.poll() is None:
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        anonymous = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
        peak = max(peak, *(int(kilobytes) << 10 for kilobytes in anonymous), 0)
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"convert failed with exit code {process.returncode}")
    return time.monotonic() - start, peak


def time_restore(directory: pathlib.Path) -> float:
    """Load every array onto the first device through Orbax's plain API, a layer at a time, and drop it again."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    metadata = ocp.metadata(directory / "params").metadata
    leaves, tree = jax.tree.flatten_with_path(metadata, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    groups = itertools.groupby(range(len(leaves)), key=lambda i: leaves[i][0][:2])
    context = ocp.Context()
    context.memory.read_concurrent_bytes = 1 << 30
    seconds = 0.0
    for _, members in groups:
        wanted = set(members)
        abstract = tree.unflatten(
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) if i in wanted else ocp.PLACEHOLDER
            for i, (_, leaf) in enumerate(leaves)
        )
        start = time.monotonic()
        with context:
            loaded = ocp.load(directory / "params", abstract)
        jax.block_until_ready([leaf for leaf in jax.tree.leaves(loaded) if leaf is not ...])
        seconds += time.monotonic() - start
        del loaded
    return seconds


if __name__ == "__main__":
    app.run(main)
