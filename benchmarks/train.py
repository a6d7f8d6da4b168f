"""Time training steps on random weights and random tokens: LoRA of the whole model, or all weights of fewer layers.

    python -m benchmarks.train --rows=2 --set lora_rank=32 'lora_targets=["attention"]'
    python -m benchmarks.train --layers=5 --rows=4 --set moment_dtype=bfloat16
    python -m benchmarks.train --layers=5 --rows=4 --sharding=fsdp       # over all devices

The first step compiles and is not counted. Operations are counted as `ernie_jax.train.watch.Pace` says: 6 for each
weight that a token goes through, 4 for frozen ones beside adapters, attention, and nothing for what is computed again.
Their share is of the product of two matrices that the device reached just before.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import pathlib
import statistics
import sys
import time

import jax
import numpy as np

from ernie_jax.bench import profile
from ernie_jax.bench.machine import measure_machine
from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.sharding import make_layout, single
from ernie_jax.train.data import Batch
from ernie_jax.train.recipe import load_recipe
from ernie_jax.train.trainer import Trainer
from ernie_jax.train.watch import Pace

KERNELS = 10  # of a profile


def draw_batch(rng: np.random.Generator, rows: int, length: int, vocab: int) -> Batch:
    """Draw rows of one document each, all of which is learnt."""
    tokens = rng.integers(3, vocab, (rows, length + 1), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return Batch(tokens[:, :-1], positions, np.zeros_like(positions), tokens[:, 1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/ernie-4.5-21b-a3b.json", help="config.json of a model")
    parser.add_argument("--layers", type=int, help="only so many; default: all")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=8192, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--sharding", help="over all devices; default: one device")
    parser.add_argument("--set", nargs="*", default=[], help="recipe fields, name=value")
    parser.add_argument("--profile", type=pathlib.Path, help="folder for a trace of one step more")
    parser.add_argument("--json", type=pathlib.Path, help="file for the figures")
    flags = parser.parse_args()

    config = dataclasses.replace(ModelConfig.from_file(flags.config), num_nextn_predict_layers=0)
    if flags.layers:
        config = dataclasses.replace(config, num_hidden_layers=flags.layers, moe_layer_end_index=flags.layers - 1)
    shape = [f"batch_size={flags.rows}", f"sequence_length={flags.length}"]
    recipe = load_recipe(pathlib.Path(__file__).with_suffix(".toml"), [*shape, *flags.set])
    layout = make_layout(config, jax.devices(), None, flags.sharding) if flags.sharding else single()
    matmul = measure_machine(jax.devices()[0]).matmul * layout.mesh.size
    trainer = Trainer(recipe, config, layout)
    sizes = {name: leaf.size for name, leaf in trainer.plan.abstract.items()}
    pace = Pace(config, layout, sizes, adapters=recipe.lora is not None)
    rng = np.random.default_rng(0)
    state, seconds = trainer.initial_state(), []

    def step() -> float:
        nonlocal state
        state, values = trainer.step(state, trainer.place(draw_batch(rng, flags.rows, flags.length, config.vocab_size)))
        return float(values["train_loss"])  # which waits for it

    began = time.perf_counter()
    loss = step()
    print(
        f"{layout.mesh.size} x {jax.devices()[0].device_kind} · {layout.describe()} · {config.num_hidden_layers} layers"
    )
    print(f"experts: {recipe.expert_backend} · attention: {trainer.backends.attention} · remat: {recipe.remat} · "
          f"moments: {recipe.moment_dtype} · first step {time.perf_counter() - began:.0f} s, loss {loss:.3f}",
          flush=True)  # fmt: skip
    for _ in range(flags.steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    pace.count(draw_batch(rng, flags.rows, flags.length, config.vocab_size))
    median = statistics.median(seconds)
    row = {
        "seconds": median,
        "tokens_per_second": flags.rows * flags.length / median,
        "flops_per_second": pace.operations / median,
        "share": pace.operations / median / matmul,
        "memory_gb": pace.measure().get("memory_gb"),
    }
    print(f"{median:.3f} s a step: {row['tokens_per_second']:,.0f} tokens/s, "
          f"{row['flops_per_second'] / 1e12:.1f} TFLOP/s, {row['share']:.1%} of {matmul / 1e12:.1f}")  # fmt: skip
    if row["memory_gb"]:
        print(f"{row['memory_gb']:.1f} GB at most")
    if flags.profile:
        with jax.profiler.trace(flags.profile):
            step()
        newest = max(flags.profile.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
        found = profile.read(json.loads(gzip.decompress(newest.read_bytes()))["traceEvents"])
        for kernel in found.kernels[:KERNELS]:
            cost = f"{kernel.seconds * 1e3:9.2f} ms {kernel.share:6.1%}"
            print(f"  {cost} {kernel.count:6d} {kernel.scope:10} {kernel.name}")
    if flags.json:
        flags.json.write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
