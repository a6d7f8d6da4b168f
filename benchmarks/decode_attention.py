"""Time the attention of a decode step at the 21B model's sizes on one GPU, beside its floor.

    python -m benchmarks.decode_attention [BACKEND [KV_DTYPE]]

Each row is a jitted program over the pages of a few layers, of which there are enough that no cache holds them; the
floor is the keys and values that a layer must read over the bandwidth of a copy on this machine. Pages lie in no order.
"""

from __future__ import annotations

import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.ops import bandwidth
from ernie_jax.engine.cache import kv_name, parse_kv_dtype
from ernie_jax.ops import RaggedBatch, paged_attention
from ernie_jax.ops.pages import Pages, ScaledPages, is_scaled, quantize_heads, round_to

LAYERS, K, R, H, PAGE = 6, 4, 5, 128, 128


def make_pages(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Pages:
    numbers = jax.random.normal(key, shape, jnp.bfloat16)
    if not is_scaled(dtype):
        return round_to(numbers, dtype)
    values, scales = quantize_heads(numbers)
    return ScaledPages(values, scales.swapaxes(1, 2))


def time_step(lengths: np.ndarray, backend: str, dtype: jnp.dtype) -> float:
    """Return the seconds of a layer."""
    rng = np.random.default_rng(0)
    needed = -(-lengths // PAGE)
    count, width = int(needed.sum()) + 1, 4
    while width < needed.max():
        width *= 4
    table = np.full((len(lengths), width), count - 1, np.int32)
    table[np.arange(width) < needed[:, None]] = rng.permutation(count - 1)
    rows = np.arange(len(lengths) + 1, dtype=np.int32)
    batch = RaggedBatch(*map(jnp.asarray, (lengths - 1, rows[:-1], rows, lengths, table)), max_query=1)
    shape = count, PAGE, 2 * K, H
    make = jax.jit(lambda key: [make_pages(key, shape, dtype) for key in jax.random.split(key, LAYERS)])
    sets = -(-(256 << 20) // (dtype.itemsize * LAYERS * math.prod(shape)))
    pages = [make(key) for key in jax.random.split(jax.random.key(1), sets)]
    q, k, v = (
        jax.random.normal(jax.random.key(2), (len(lengths), *heads, H), jnp.bfloat16) for heads in ((K, R), (K,), (K,))
    )

    def step(q, k, v, pages, batch):
        updated = []
        for layer in pages:  # each waits for the last
            q, layer = paged_attention(q, k, v, layer, batch, backend)
            updated.append(layer)
        return q, updated

    run = jax.jit(step, donate_argnums=3)
    calls, times = max(16, sets), []  # many, so that the host is ahead of the device
    for _ in range(9):
        jax.block_until_ready(pages)
        start = time.perf_counter()
        for call in range(calls):
            out, pages[call % sets] = run(q, k, v, pages[call % sets], batch)
        out.block_until_ready()
        times.append((time.perf_counter() - start) / calls)
    return float(np.median(times[2:])) / LAYERS


def main() -> None:
    backend = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    dtype = parse_kv_dtype(sys.argv[2] if len(sys.argv) > 2 else None, jnp.bfloat16)
    peak = bandwidth()
    kind = jax.devices()[0].device_kind
    print(f"{kind} · copy {peak / 1e12:.2f} TB/s · attention backend {backend} · {kv_name(dtype)}", flush=True)
    rng = np.random.default_rng(1)
    cases = [
        (f"{batch} x {length}", np.full(batch, length))
        for batch, length in (
            (1, 128),
            (1, 512),
            (1, 2048),
            (1, 32768),
            (1, 131072),
            (8, 288),
            (64, 288),
            (256, 288),
            (16, 8500),
            (64, 1500),
            (256, 1500),
        )
    ]
    cases.append(("64 x 1 to 4096", rng.integers(1, 4096, 64)))
    cases.append(("63 x 288 and 60000", np.append(np.full(63, 288), 60_000)))
    for name, lengths in cases:
        read = 2.0 * K * (H * dtype.itemsize + 4 * is_scaled(dtype)) * lengths.sum()
        try:
            taken = time_step(lengths.astype(np.int32), backend, dtype)
        except Exception as error:  # one row must not lose the others
            print(f"{name:20s} {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        print(
            f"{name:20s} {taken * 1e6:8.1f} us  {read / taken / 1e9:7.0f} GB/s  floor {read / peak * 1e6:7.1f} us  "
            f"{read / peak / taken:4.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
