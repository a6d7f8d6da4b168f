"""Time the router of a decode step at the 21B model's sizes on one GPU: our kernel, our two kernels, plain XLA.

    python -m benchmarks.router

Microseconds a call in one jitted program of 112 calls, each waiting for the last through a tiny sum over the bias,
which is included; the row "sum alone" says what that costs. `warm` goes through 28 routers' weights (18 MB) again and
again; `cold` through 112 (73 MB), more than the cache holds, which is how a decode step finds them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from benchmarks.ops import seconds
from ernie_jax.ops import ROUTER_BACKENDS

D, E, K, LAYERS, CALLS = 2560, 64, 6, 28, 112


def only_sums(x, weight, bias, k, norm_min):
    return [bias[None]] * 3


CASES = {
    "sum alone": only_sums,
    "cuda": ROUTER_BACKENDS["cuda"],
    "cuda, two kernels": functools.partial(ROUTER_BACKENDS["cuda"], clusters=False),
    "xla": ROUTER_BACKENDS["xla"],
}


def time_router(case: str, tokens: int, weights: list[jax.Array]) -> list[float]:
    """Return seconds a call over few weights and over all."""
    x = jax.random.normal(jax.random.key(tokens), (tokens, D), jnp.bfloat16)

    @jax.jit
    def run(x, bias, weights):
        for weight in weights:
            routing = CASES[case](x, weight, bias, K, 1e-12)
            used = sum(out[0, 0].astype(jnp.float32) for out in routing)  # or XLA leaves it out
            bias, x = jax.lax.optimization_barrier((bias + used * 1e-6, x))  # nothing merges across calls
        return bias

    bias = jnp.full((E,), 40, jnp.float32)
    some = weights[:LAYERS] * (CALLS // LAYERS)
    return [seconds(lambda w=w: run(x, bias, w)) / CALLS for w in (some, weights)]


def main() -> None:
    keys = jax.random.split(jax.random.key(0), CALLS)
    make = jax.jit(lambda key: jax.random.normal(key, (E, D)) * 0.02)
    weights = [make(key) for key in keys]
    print(f"{jax.devices()[0].device_kind}\n{'':34s} {'warm us':>9} {'cold us':>9}", flush=True)
    for tokens in (1, 8, 64, 256):
        for case in CASES:
            name = f"route {tokens:3d}, {case}"
            try:
                warm, cold = time_router(case, tokens, weights)
            except Exception as error:  # one row must not lose the others
                print(f"{name:34s} {type(error).__name__}: {str(error)[:200]}", flush=True)
                continue
            print(f"{name:34s} {warm * 1e6:9.2f} {cold * 1e6:9.2f}", flush=True)


if __name__ == "__main__":
    main()
