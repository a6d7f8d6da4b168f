"""Time the ops of a decode step at the 21B model's sizes on one GPU, beside their floors.

    python benchmarks/ops.py [substring of the rows to run]

Each row runs its op some hundred times in one jitted program, over weights of GBs, so that no cache helps; the
floor is the bytes of weights that the op must read over the bandwidth of a copy on this machine.
"""

from __future__ import annotations

import itertools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from ernie_jax.ops import grouped_mlp, linear

D, F, E, K, SHARED, VOCAB = 2560, 1536, 64, 6, 3072, 103424


def bandwidth() -> float:
    """Return the bytes a second that a copy reads and writes."""
    x = jnp.ones(1 << 30, jnp.bfloat16)
    copies = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, x: x + 1, x))
    return 20 * 2 * x.nbytes / seconds(lambda: copies(x))


def seconds(call, repeats: int = 7) -> float:
    """Return the median time of a call that returns arrays, after two warm-ups."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))


def weights(count: int, *shape: int) -> list[jax.Array]:
    make = jax.jit(lambda key: (jax.random.normal(key, shape, jnp.bfloat16) * 0.02).astype(jnp.bfloat16))
    return [make(key) for key in jax.random.split(jax.random.key(0), count)]


def time_linear(tokens: int, inner: int, outer: int, backend: str) -> tuple[float, float]:
    """Return seconds a call and the bytes it must read."""
    matrices = weights(max(4, int(2e9 / (2 * inner * outer))), outer, inner)
    x = jnp.ones((tokens, inner), jnp.bfloat16)

    @jax.jit
    def run(x, matrices):
        for w in matrices:
            y = linear("td,od->to", x, w, backend=backend)
            x = x + (y[:, :1] * 0).astype(x.dtype)  # each call waits for the last
        return x

    return seconds(lambda: run(x, matrices)) / len(matrices), 2.0 * inner * outer


def time_experts(tokens: int, backend: str, shared: bool) -> tuple[float, float]:
    layers, calls = 2, 24
    gate_up, down = weights(layers, E, 2, F, D), weights(layers, E, D, F)
    along = list(zip(weights(layers, 2, SHARED, D), weights(layers, D, SHARED), strict=True))
    rng = np.random.default_rng(tokens)
    chosen = [np.argsort(rng.random((tokens, E)), axis=1)[:, :K].astype(np.int32) for _ in range(calls)]
    x, scale = jnp.ones((tokens, D), jnp.bfloat16), jnp.full((tokens, K), 1 / K, jnp.bfloat16)

    @jax.jit
    def run(x, chosen, gate_up, down, along):
        for c, (gu, dn, s) in zip(chosen, itertools.cycle(zip(gate_up, down, along, strict=True)), strict=False):
            y = grouped_mlp(x, c, scale, gu, dn, backend, 0, s if shared else None)
            x = x + y * 0
        return x

    distinct = sum(len(np.unique(c)) for c in chosen) / calls
    total = distinct * 6 * F * D + (6 * SHARED * D if shared else 0)
    return seconds(lambda: run(x, chosen, gate_up, down, along)) / calls, total


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    peak = bandwidth()
    print(f"{jax.devices()[0].device_kind} · copy {peak / 1e12:.2f} TB/s", flush=True)
    rows = []
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        rows.append((f"experts cuda {tokens}", time_experts, (tokens, "cuda", False)))
        if tokens <= 16:
            rows.append((f"experts+shared cuda {tokens}", time_experts, (tokens, "cuda", True)))
        if tokens >= 2:
            rows.append((f"experts mosaic {tokens}", time_experts, (tokens, "mosaic", False)))
        if tokens >= 32:
            rows.append((f"experts dense {tokens}", time_experts, (tokens, "dense", False)))
    for tokens in (1, 8, 16, 64, 128, 256):
        for name, inner, outer in (("qkv", D, 3584), ("o", D, D), ("dense down", 12288, D), ("head", D, VOCAB)):
            for backend in ("cuda" if tokens <= 16 else "mosaic", "xla"):
                rows.append((f"linear {name} {backend} {tokens}", time_linear, (tokens, inner, outer, backend)))
    for name, measure, arguments in rows:
        if wanted not in name:
            continue
        try:
            taken, total = measure(*arguments)
        except Exception as error:  # one row must not lose the others
            print(f"{name:28s} {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        print(
            f"{name:28s} {taken * 1e6:8.1f} us  floor {total / peak * 1e6:7.1f} us  {total / peak / taken:4.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
