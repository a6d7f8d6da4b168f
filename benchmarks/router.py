"""Time the router of a decode step at the 21B model's sizes on one GPU: our kernel, our two kernels, plain XLA.

    python benchmarks/router.py

Microseconds a call in one jitted program of 112 calls, each waiting for the last through a tiny sum over the bias,
which is included; the row "sum alone" says what that costs. `warm` goes through 28 routers' weights (18 MB) again and
again; `cold` through 112 (73 MB), more than the cache holds, which is how a decode step finds them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from ops import seconds

from ernie_jax.ops import ROUTER_BACKENDS

D, E, K, LAYERS, CALLS = 2560, 64, 6, 28, 112


def only_sums(x, norm_weight, epsilon, weight, bias, k, norm_min):
    return x, bias[None], bias[None], bias[None]


CASES = {
    "sum alone": only_sums,
    "cuda": ROUTER_BACKENDS["cuda"],
    "cuda, two kernels": functools.partial(ROUTER_BACKENDS["cuda"], clusters=False),
    "xla": ROUTER_BACKENDS["xla"],
}


def time_router(case: str, tokens: int, normed: bool, weights: list[jax.Array], norm: jax.Array) -> list[float]:
    """Return seconds a call over few weights and over all."""
    x = jax.random.normal(jax.random.key(tokens), (tokens, D), jnp.bfloat16)

    @jax.jit
    def run(x, bias, weights, norm):
        for weight in weights:
            h, *routing = CASES[case](x, norm if normed else None, 1e-5, weight, bias, K, 1e-12)
            used = sum(out[0, 0].astype(jnp.float32) for out in (h, *routing))  # or XLA leaves it out
            bias, x = jax.lax.optimization_barrier((bias + used * 1e-6, x))  # nothing merges across calls
        return bias

    bias = jnp.full((E,), 40, jnp.float32)
    some = weights[:LAYERS] * (CALLS // LAYERS)
    return [seconds(lambda w=w: run(x, bias, w, norm)) / CALLS for w in (some, weights)]


def main() -> None:
    keys = jax.random.split(jax.random.key(0), CALLS)
    make = jax.jit(lambda key: jax.random.normal(key, (E, D)) * 0.02)
    weights, norm = [make(key) for key in keys], jnp.ones(D, jnp.bfloat16)
    print(f"{jax.devices()[0].device_kind}\n{'':34s} {'warm us':>9} {'cold us':>9}", flush=True)
    for normed in (False, True):
        for tokens in (1, 8, 64, 256):
            for case in CASES:
                if normed and case == "sum alone":
                    continue
                name = f"{'norm + ' if normed else ''}route {tokens:3d}, {case}"
                try:
                    warm, cold = time_router(case, tokens, normed, weights, norm)
                except Exception as error:  # one row must not lose the others
                    print(f"{name:34s} {type(error).__name__}: {str(error)[:200]}", flush=True)
                    continue
                print(f"{name:34s} {warm * 1e6:9.2f} {cold * 1e6:9.2f}", flush=True)


if __name__ == "__main__":
    main()
