"""Time a model with random weights in several shardings, against one device of the machine in the same run.

    python -m benchmarks.sharded --shardings=single,expert,tensor,expert+data --batch=1,8,64,256

Rows are measured as by `main.py bench`, and compared with those of `single` if it ran before. The collectives' time is
the sum of their kernels on one device in a profile of decode steps, waiting for the other devices included.
"""

from __future__ import annotations

import gc
import tempfile

import jax
import numpy as np
from absl import app, flags

from ernie_jax.bench import profile, report
from ernie_jax.bench.machine import measure_machine
from ernie_jax.bench.measure import Decode, Prefill, measure
from ernie_jax.bench.ops import TracedOps
from ernie_jax.cli.models import presets
from ernie_jax.config import ModelConfig
from ernie_jax.llm import LLM

_MODEL = flags.DEFINE_enum("model", "ernie-4.5-21b-a3b-thinking", list(presets()), "preset")
_SHARDINGS = flags.DEFINE_list("shardings", ["single", "expert", "tensor", "expert+data"], "presets, in this order")
_BATCH = flags.DEFINE_list("batch", ["1", "8", "64", "256"], "batch sizes")
_REPEATS = flags.DEFINE_integer("repeats", 2, "runs of each length")
_PREFILL = flags.DEFINE_integer("prefill", 8192, "prompt tokens of the prefill row; 0 leaves it out")
_CACHE = flags.DEFINE_integer("cache_tokens", 200_000, "the same in all shardings")


def main(_) -> None:
    config = ModelConfig.from_file(presets()[_MODEL.value])
    cases = [Decode(int(batch), 128, 64, 192) for batch in _BATCH.value]
    if _PREFILL.value:
        cases.append(Prefill(1, _PREFILL.value))
    machine = measure_machine(jax.devices()[0])
    print(report.describe_machine(machine))
    alone: dict = {}
    most = max(case.batch for case in cases)
    for sharding in _SHARDINGS.value:
        llm = LLM.random(config, sharding=sharding, max_sequences=most, cache_tokens=_CACHE.value)
        traced, rng = TracedOps(), np.random.default_rng(0)
        print(f"\n{llm.describe()}\n{report.HEADER}")
        for case in cases:
            row = measure(llm.engine, llm.layout, case, machine, traced, rng, _REPEATS.value)
            if sharding == "single":
                alone[case] = row.tokens_per_second
            ratio = f" · {row.tokens_per_second / alone[case]:.2f}x one device" if case in alone else ""
            print(report.line(row) + ratio, end="", flush=True)
            if sharding != "single" and isinstance(case, Decode):
                with tempfile.TemporaryDirectory() as folder:
                    found = profile.trace(llm.engine, case, rng, folder)
                seconds = profile.collective_seconds(found.kernels) / profile.STEPS
                print(f" · collectives {seconds * 1e3:.2f} ms", end="")
            print(flush=True)
        del llm
        gc.collect()


if __name__ == "__main__":
    app.run(main)
