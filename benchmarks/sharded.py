"""Time a full-size model with random weights in several shardings, against one device of the machine in the same run.

    python benchmarks/sharded.py --shardings=single,expert,tensor,expert+data --batch=1,8,64,256

A decode step is (time of 192 new tokens - time of 64) / 128 through `LLM.generate`, prompts of 128 random tokens,
greedy sampling included, median of the repetitions. The collectives' time is the sum of their kernels on one device in
a profile of 16 steps, waiting for the other devices included.
"""

from __future__ import annotations

import collections
import gc
import gzip
import json
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np
from absl import app, flags

from ernie_jax.cli.models import presets
from ernie_jax.config import ModelConfig
from ernie_jax.engine import SamplingParams
from ernie_jax.llm import LLM

_MODEL = flags.DEFINE_enum("model", "ernie-4.5-21b-a3b-thinking", list(presets()), "preset")
_SHARDINGS = flags.DEFINE_list("shardings", ["single", "expert", "tensor", "expert+data"], "presets, in this order")
_BATCH = flags.DEFINE_list("batch", ["1", "8", "64", "256"], "batch sizes")
_REPEATS = flags.DEFINE_integer("repeats", 2, "runs of each length")
_PREFILL = flags.DEFINE_integer("prefill", 8192, "prompt tokens of the prefill row; 0 leaves it out")
_PROFILE = flags.DEFINE_bool("profile", True, "take the time of the collectives from a profile")

_PROMPT, _SHORT, _LONG = 128, 64, 192
_COLLECTIVES = ("nccl", "psum", "all-reduce", "all_reduce", "all-gather", "all_gather")  # in the names of kernels


def timed(llm: LLM, rng: np.random.Generator, batch: int, prompt: int, new: int) -> float:
    prompts = rng.integers(3, llm.config.vocab_size, (batch, prompt)).tolist()
    params = SamplingParams(max_new_tokens=new, temperature=0.0, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(prompts, params)
    return time.perf_counter() - start


def collective_time(llm: LLM, rng: np.random.Generator, batch: int) -> float | None:
    """Return the seconds of a decode step in the kernels of collectives, from a profile of decode steps alone."""
    params = SamplingParams(max_new_tokens=40, temperature=0.0, ignore_eos=True)
    for prompt in rng.integers(3, llm.config.vocab_size, (batch, 16)).tolist():
        llm.engine.submit(prompt, params)
    while any(s.computed < len(s.prompt) for s in (*llm.engine._waiting, *llm.engine._running)):
        llm.engine.step()
    for _ in range(8):
        llm.engine.step()
    steps = 16
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                llm.engine.step()
        files = list(pathlib.Path(folder).rglob("*.trace.json.gz"))
        events = json.loads(gzip.decompress(files[0].read_bytes()))["traceEvents"] if files else []
    while llm.engine.has_work:
        llm.engine.step()
    devices = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    by_device = collections.Counter()
    for event in events:
        on_device = event.get("ph") == "X" and "GPU" in devices.get(event["pid"], "")
        if on_device and any(word in event["name"].lower() for word in _COLLECTIVES):
            by_device[event["pid"]] += event["dur"] * 1e-6
    return max(by_device.values()) / steps if by_device else None


def main(_) -> None:
    config = ModelConfig.from_file(presets()[_MODEL.value])
    batches = [int(b) for b in _BATCH.value]
    rng = np.random.default_rng(0)
    alone: dict[str, float] = {}
    for sharding in _SHARDINGS.value:
        llm = LLM.random(
            config, sharding=sharding, max_sequences=max(batches), prefill_chunk=2048, cache_tokens=200_000
        )
        print(llm.describe())
        print(f"{'':>14} {'ms':>9} {'tok/s':>9} {'of one':>8} {'sum ms':>8} {'first run s':>12}")

        def report(row: str, seconds: float, tokens: int, first: float, collectives: float | None, sharding=sharding):
            rate = tokens / seconds
            alone.setdefault(row, rate if sharding == "single" else float("nan"))
            shown = "" if collectives is None else f"{collectives * 1e3:.2f}"
            print(
                f"{row:>14} {seconds * 1e3:>9.2f} {rate:>9.0f} {rate / alone[row]:>7.2f}x {shown:>8} {first:>12.1f}",
                flush=True,
            )

        for batch in batches:
            start = time.perf_counter()
            timed(llm, rng, batch, _PROMPT, _SHORT)
            first = time.perf_counter() - start
            runs = [
                (timed(llm, rng, batch, _PROMPT, _LONG), timed(llm, rng, batch, _PROMPT, _SHORT))
                for _ in range(_REPEATS.value)
            ]
            step = statistics.median((long - short) / (_LONG - _SHORT) for long, short in runs)
            profiled = _PROFILE.value and sharding != "single"
            report(f"batch {batch}", step, batch, first, collective_time(llm, rng, batch) if profiled else None)
        if _PREFILL.value:
            first = timed(llm, rng, 1, _PREFILL.value, 1)
            took = statistics.median(timed(llm, rng, 1, _PREFILL.value, 1) for _ in range(_REPEATS.value))
            report(f"prefill {_PREFILL.value}", took, _PREFILL.value, first, None)
        del llm
        gc.collect()


if __name__ == "__main__":
    app.run(main)
