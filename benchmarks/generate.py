"""Time decoding and prefill of a full-size model with random weights, through the same `LLM.generate` that users call.

    python benchmarks/generate.py --model=ernie-4.5-21b-a3b --batch=1,8,64

A decode step is (time of 256 new tokens - time of 64) / 192, prompts of 128 random tokens, sampling included, median of
the repetitions. The floor is the fewest bytes a step can read (each distinct expert once, under even routing) over the
bandwidth of a device copy, measured at start.
"""

from __future__ import annotations

import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ernie_jax.cli.models import presets
from ernie_jax.config import ModelConfig
from ernie_jax.engine import SamplingParams
from ernie_jax.llm import LLM
from ernie_jax.model import parameter_specs

_MODEL = flags.DEFINE_enum("model", "ernie-4.5-21b-a3b-thinking", list(presets()), "preset")
_BATCH = flags.DEFINE_list("batch", ["1", "8", "64"], "batch sizes")
_REPEATS = flags.DEFINE_integer("repeats", 3, "runs of each length")
_PREFILL = flags.DEFINE_integer("prefill", 2048, "prompt tokens of the prefill row; 0 leaves it out")
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "of weights and cache")


def copy_bandwidth() -> float:
    """Return bytes read plus written per second by a device copy."""
    x = jnp.ones((1 << 28,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    copy(x).block_until_ready()
    start = time.perf_counter()
    for _ in range(10):
        y = copy(x)
    y.block_until_ready()
    return 10 * 2 * x.nbytes / (time.perf_counter() - start)


def step_bytes(config: ModelConfig, dtype: str, batch: int, context: int) -> float:
    """Count the fewest bytes that one decode step reads."""
    specs = parameter_specs(config, jnp.dtype(dtype))
    total = 0.0
    reached = 1 - (1 - config.moe_k / config.moe_num_experts) ** batch if config.is_moe else 0
    for name, spec in specs.items():
        if name.startswith("mtp.") or (name.startswith("embed.") and not config.tie_word_embeddings):
            continue
        total += math.prod(spec.shape) * spec.dtype.itemsize * (reached if ".experts." in name else 1)
    per_token = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    return total + batch * context * per_token * jnp.dtype(dtype).itemsize


def timed(llm: LLM, rng: np.random.Generator, batch: int, prompt: int, new: int) -> float:
    prompts = rng.integers(3, llm.config.vocab_size, (batch, prompt)).tolist()
    params = SamplingParams(max_new_tokens=new, temperature=0.8, top_p=0.8, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(prompts, params)
    return time.perf_counter() - start


def main(_) -> None:
    config = ModelConfig.from_file(presets()[_MODEL.value])
    batches = [int(b) for b in _BATCH.value]
    bandwidth = copy_bandwidth()
    start = time.perf_counter()
    llm = LLM.random(config, _DTYPE.value, max_sequences=max(batches), prefill_chunk=2048)
    jax.block_until_ready(llm.engine._pages)
    print(llm.describe())
    print(f"{_MODEL.value}, random weights in {time.perf_counter() - start:.1f} s; copy {bandwidth / 1e12:.2f} TB/s")
    print(f"{'batch':>8} {'ms/step':>9} {'tok/s':>9} {'floor ms':>9} {'of floor':>9} {'compile s':>10}")
    rng = np.random.default_rng(0)
    for batch in batches:
        start = time.perf_counter()
        timed(llm, rng, batch, 128, 4)
        timed(llm, rng, batch, 128, 256)  # compiles every context bucket on the way
        compiling = time.perf_counter() - start
        runs = [(timed(llm, rng, batch, 128, 256), timed(llm, rng, batch, 128, 64)) for _ in range(_REPEATS.value)]
        step = statistics.median((long - short) / 192 for long, short in runs)
        floor = step_bytes(config, _DTYPE.value, batch, 288) / bandwidth
        print(
            f"{batch:>8} {step * 1e3:>9.2f} {batch / step:>9.0f} {floor * 1e3:>9.2f} {floor / step:>9.0%} "
            f"{compiling:>10.1f}",
            flush=True,
        )
    if _PREFILL.value:
        timed(llm, rng, 1, _PREFILL.value, 1)
        took = statistics.median(timed(llm, rng, 1, _PREFILL.value, 1) for _ in range(_REPEATS.value))
        print(f"prefill of {_PREFILL.value}: {_PREFILL.value / took:,.0f} tok/s, chunks of 2048")


if __name__ == "__main__":
    app.run(main)
