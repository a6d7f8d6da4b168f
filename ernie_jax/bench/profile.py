"""Profile a case: a trace to look at, and its largest kernels."""

from __future__ import annotations

import collections
import gzip
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from ernie_jax.bench import drive
from ernie_jax.bench.measure import Case, Prefill
from ernie_jax.engine import Engine

STEPS = 16  # decode steps in a trace
_WARM_UP = 8
_SCOPES = ("attention", "router", "experts", "shared", "mlp", "head", "embed")  # of the model, inner before outer
_NUMBER = re.compile(r"([._]\d+)+$")
_COLLECTIVES = ("nccl", "psum", "all-reduce", "all_reduce", "all-gather", "all_gather", "all-to-all")


class Kernel(NamedTuple):
    """Kernels of one name, numbers at its end left out; `share` is of all kernels' time on the device."""

    name: str
    scope: str
    count: int
    seconds: float
    share: float


class Profile(NamedTuple):
    """Kernels, largest total first, and the seconds from the first's start to the last's end."""

    kernels: list[Kernel]
    span: float

    @property
    def busy(self) -> float:
        """The seconds of all kernels; of a device those in which it is busy, of a host those of all its threads."""
        return sum(kernel.seconds for kernel in self.kernels)


def trace(engine: Engine, case: Case, rng: np.random.Generator, directory: str | os.PathLike) -> Profile:
    """Record some decode steps, or one prefill, into a directory.

    Open the trace with Perfetto, XProf or TensorBoard. The case must have been compiled before.
    """
    prompts = drive.random_prompts(engine, rng, [case.context] * case.batch)
    drive.shuffle_pages(engine, rng)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # a trace holds so many events, and Python's own would fill it
    if isinstance(case, Prefill):
        drive.settle(engine)
        with jax.profiler.trace(directory, profiler_options=options):
            drive.run(engine, prompts, *case.runs)
    else:
        drive.start_decoding(engine, prompts, STEPS + _WARM_UP + 1)
        for _ in range(_WARM_UP):
            engine.step()
        drive.settle(engine)
        with jax.profiler.trace(directory, profiler_options=options):
            for _ in range(STEPS):
                engine.step()
            drive.settle(engine)
        while engine.has_work:
            engine.step()
    newest = max(pathlib.Path(directory).rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    return read(json.loads(gzip.decompress(newest.read_bytes()))["traceEvents"])


def read(events: Sequence[dict]) -> Profile:
    """Add up the time of each kernel on the first device of a trace.

    Time is a kernel's own: what runs inside an op (a loop's body) counts there, and on a GPU no time counts twice. On a
    CPU XLA's ops are the kernels.
    """
    chosen, in_streams = _device_events(events)
    totals: dict[str, float] = collections.Counter()
    counts: dict[str, int] = collections.Counter()
    scopes: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for event, own in (_times_by_ends if in_streams else _times_by_nesting)(chosen):
        name = _NUMBER.sub("", event["name"])
        totals[name] += own
        counts[name] += 1
        scopes[name][_scope(event)] += own
    whole = sum(totals.values()) or 1.0
    found = [
        Kernel(name, scopes[name].most_common(1)[0][0], counts[name], total * 1e-6, total / whole)
        for name, total in totals.items()
    ]
    span = max(map(_end, chosen), default=0) - min((event["ts"] for event in chosen), default=0)
    return Profile(sorted(found, key=lambda kernel: -kernel.seconds), span * 1e-6)


def collective_seconds(found: Iterable[Kernel]) -> float:
    """Return the seconds in collectives, waiting for other devices included."""
    return sum(kernel.seconds for kernel in found if any(word in kernel.name.lower() for word in _COLLECTIVES))


def _device_events(events: Sequence[dict]) -> tuple[list[dict], bool]:
    """Choose the events that are kernels of the first device, or XLA's ops if there is only a host.

    Returns:
      The events, and whether they are kernels in a GPU's streams.
    """
    processes, threads = {}, {}
    for event in events:
        if event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    complete = [event for event in events if event.get("ph") == "X" and "dur" in event]
    devices = sorted((name, pid) for pid, name in processes.items() if re.search(r"/device:(GPU|TPU):\d+", name))
    if not devices:
        return [event for event in complete if "hlo_op" in event.get("args", {})], False
    _, first = devices[0]
    # A GPU's kernels are in its streams, a TPU's ops in one line; other lines show the same time by module or scope.
    own = {key for key, name in threads.items() if key[0] == first and name.startswith(("Stream", "XLA Ops"))}
    streams = {key for key in own if threads[key].startswith("Stream")}
    return [event for event in complete if (event["pid"], event["tid"]) in (streams or own)], bool(streams)


def _times_by_ends(events: Iterable[dict]) -> list[tuple[dict, float]]:
    """Pair events with the microseconds from when all that ended before them had ended; these add up to busy time.

    On a GPU a kernel may be launched before the one ahead of it ends, and waits for it.
    """
    own, last = [], -math.inf
    for event in sorted(events, key=_end):
        own.append((event, _end(event) - max(event["ts"], last)))
        last = _end(event)
    return own


def _end(event: dict) -> float:
    return event["ts"] + event["dur"]


def _times_by_nesting(events: Iterable[dict]) -> list[tuple[dict, float]]:
    """Pair events with their microseconds less those of events inside them, on the same line."""
    own: list[tuple[dict, float]] = []
    lines = collections.defaultdict(list)
    for event in events:
        lines[event["pid"], event["tid"]].append(event)
    for line in lines.values():
        open_: list[list] = []  # [end, event, own time]
        for event in sorted(line, key=lambda event: (event["ts"], -event["dur"])):
            while open_ and open_[-1][0] <= event["ts"]:
                own.append(tuple(open_.pop()[1:]))
            if open_:
                open_[-1][2] -= event["dur"]
            open_.append([_end(event), event, event["dur"]])
        own += [tuple(item[1:]) for item in open_]
    return own


def _scope(event: dict) -> str:
    """Return the innermost of the model's scopes that an event's details name."""
    details = " ".join(value for value in event.get("args", {}).values() if isinstance(value, str))
    return next((scope for scope in _SCOPES if re.search(rf"/{scope}\b", details)), "")
