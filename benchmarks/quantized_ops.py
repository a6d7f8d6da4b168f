"""Check and time our kernels with quantised weights at the 21B model's sizes on one Hopper GPU.

    python -m benchmarks.quantized_ops [experts] [token] [products] [tiles] [--quantize=int8,fp8,int4,none]

`experts`: the experts of 2 and more tokens, where these can go along with the shared ones. `token`: those of a single
token. `products`: dense products by each backend. `tiles`: what else the experts' product could be cut into. Each part
and form is a process of its own with a time limit. Errors are those of a few tokens against float64; TB/s count each
weight of a chosen expert once, with its scales; "none" is bfloat16, for comparison.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.prefill_ops import BOUND, TOP, D, E, F, distance, draw, guarded, normal, pair_flops, seconds
from ernie_jax.errors import UserError
from ernie_jax.ops import Quantized, dequantize, grouped_mlp, linear, quantized_specs, takes_shared
from ernie_jax.ops.mosaic import QuantizedTiles, by_mosaic, multiplies_fp8

FORM = os.environ.get("QUANTIZED_OPS_FORM", "int8")
SHARED = 2 * F  # what the shared experts are wide
LIMIT = 150  # seconds
LAYERS = 3  # of weights that take turns, so that no cache helps


def weight(seed: int, *shape: int):
    """Draw a weight [*out, in] that keeps numbers at their size."""
    if FORM == "none":
        return normal(seed, shape, shape[-1] ** -0.5)
    specs = quantized_specs(FORM, shape, len(shape) - 1)
    spread = {"int8": 73.3, "fp8": 1.0, "int4": 4.6}[FORM]  # of the values

    @jax.jit
    def make(key):
        first, second = jax.random.split(key)
        if FORM == "fp8":
            values = jax.random.normal(first, specs.values.shape, jnp.bfloat16).astype(specs.values.dtype)
        else:
            least = -127 if FORM == "int8" else 0
            values = jax.random.randint(first, specs.values.shape, least, least + 255, specs.values.dtype)
        scales = jax.random.uniform(second, specs.scales.shape, jnp.float32, 0.5, 1.5)
        return Quantized(values, (scales * shape[-1] ** -0.5 / spread).astype(specs.scales.dtype))

    return make(jax.random.key(seed))


def wide(part) -> np.ndarray:
    if isinstance(part, Quantized):
        part = dequantize(jax.tree.map(np.asarray, part))
    return np.asarray(part, np.float64)


def judge(error: float, tokens: int) -> str:
    """Say how large an error is; where tokens become fp8, it may be ten times as large."""
    eight = FORM == "fp8" and multiplies_fp8(tokens, jnp.float8_e4m3fn, experts=True)
    return f"error {error:.1e}" + ("" if error < BOUND * (10 if eight else 1) else " WRONG")


def size(*weights) -> float:
    return float(sum(array.nbytes for array in jax.tree.leaves(weights)))


@functools.cache
def layers():
    """Return (gate_up, down, (shared gate_up, shared down)) of each layer."""
    return [
        (weight(4 * i, E, 2, F, D), weight(4 * i + 1, E, D, F),
         (weight(4 * i + 2, 2, SHARED, D), weight(4 * i + 3, D, SHARED)))
        for i in range(LAYERS)
    ]  # fmt: skip


def expected(x, chosen, weights, gate_up, down, shared, tokens):
    """Return the float64 result of a few tokens."""
    out = []

    def mlp(x, gate_up, down):
        gate, up = wide(gate_up) @ x
        return wide(down) @ (gate / (1 + np.exp(-gate)) * up)

    for token in tokens:
        row = np.asarray(x[token], np.float64)
        y = mlp(row, *shared) if shared else 0
        for e, by in zip(np.asarray(chosen[token]), np.asarray(weights[token], np.float64), strict=True):
            y = y + by * mlp(row, gate_up[int(e)], down[int(e)])
        out.append(y)
    return np.stack(out)


def time_experts(tokens: int, backend, shared: bool) -> str:
    x, chosen, weights = draw(tokens)
    rows = [(gate_up, down, along if shared else None) for gate_up, down, along in layers()]
    run = jax.jit(backend)
    some = np.random.default_rng().choice(tokens, min(2, tokens), replace=False)
    error = distance(run(x, chosen, weights, *rows[0])[some], expected(x, chosen, weights, *rows[0], some))
    turn = iter(range(1 << 30))
    spent = seconds(lambda: run(x, chosen, weights, *rows[next(turn) % LAYERS]), inner=9)
    gate_up, down, along = rows[0]
    used = len(np.unique(np.asarray(chosen)))
    read = size(gate_up, down) * used / E + size(along)
    flops = pair_flops(tokens * TOP, 3 * F, D) + (pair_flops(tokens, 3 * SHARED, D) if shared else 0)
    speed = f"{spent * 1e6:8.1f} us {flops / spent / 1e12:6.0f} TFLOP/s {read / spent / 1e12:5.2f} TB/s"
    return f"{speed} {judge(error, tokens)}"


def experts():
    print(f"{FORM}: experts by mosaic: sort, products, weighted sum; where they go along, with the shared ones")

    @guarded
    def row(tokens):
        def run(x, chosen, weights, gate_up, down, along):
            return grouped_mlp(x, chosen, weights, gate_up, down, "mosaic", 0, along)

        along = takes_shared("mosaic", tokens, F, SHARED, layers()[0][0].dtype)
        return f"  {tokens:6} tokens {time_experts(tokens, run, along)} {'with shared' if along else ''}"

    for tokens in (2, 8, 32, 64, 128, 256, 512, 2048, 8192):
        row(tokens)


def token():
    print(f"{FORM}: a single token's experts by cuda, with the shared ones")

    @guarded
    def row(shared):
        def run(x, chosen, weights, gate_up, down, along):
            return grouped_mlp(x, chosen, weights, gate_up, down, "cuda", 0, along)

        return f"  {'with' if shared else 'without'} shared {time_experts(1, run, shared)}"

    row(True)
    row(False)


def products():
    print(f"{FORM}: dense products")

    @guarded
    def row(name, inner, outer, tokens, backend):
        matrices = [weight(i, outer, inner) for i in range(max(3, int(1.5e8 * LAYERS / (inner * outer))))]
        x = normal(9, (tokens, inner), 1)
        run = jax.jit(functools.partial(linear, "td,od->to", backend=backend))
        rows = np.random.default_rng().choice(outer, 64, replace=False)
        part = wide(matrices[0])[rows] if outer * inner < 2e7 else wide(jax.tree.map(lambda a: a[rows], matrices[0]))
        error = distance(run(x, matrices[0])[:, rows], np.asarray(x, np.float64) @ part.T)

        @jax.jit
        def every(x, matrices):
            for w in matrices:
                y = linear("td,od->to", x, w, backend=backend)
                x = x + (y[:, :1] * 0).astype(x.dtype)  # each waits for the last
            return x

        spent = seconds(lambda: every(x, matrices), inner=3) / len(matrices)
        speed = f"{spent * 1e6:8.1f} us {size(matrices[0]) / spent / 1e12:5.2f} TB/s"
        return f"  {name:14} {tokens:5} tokens {backend:7} {speed} {judge(error, tokens)}"

    shapes = ("qkv", D, 3584), ("output", D, D), ("dense gate, up", D, 24576), ("dense down", 12288, D)
    for name, inner, outer in shapes:
        for tokens in (1, 16, 32, 64, 256, 2048):
            for backend in ("cuda", "mosaic", "xla"):
                few = tokens <= 16 if backend == "cuda" else tokens <= 512 and FORM != "none"
                if backend == "xla" or few:
                    row(name, inner, outer, tokens, backend)


def tiles():
    print(f"{FORM}: tiles of the experts' products: block, depth, steps, band")
    per_byte = 2 if FORM == "int4" else 1

    @guarded
    def row(tokens, block, depth, band):
        steps = min((224 * 1024 - 512 * min(block, 64)) // (depth * (256 + block * 2 * per_byte)), 8)
        if steps < 2:
            return f"  {tokens:6} tokens {(block, depth, band)} does not fit"
        tile = QuantizedTiles(block, depth, steps, band)

        def run(x, chosen, weights, gate_up, down, along):
            return by_mosaic(x, chosen, weights, gate_up, down, 0, along, tiles=(tile, tile))

        return f"  {tokens:6} tokens {tuple(tile)!s:20} {time_experts(tokens, run, tokens <= 512)}"

    for tokens, blocks in ((64, (8, 16, 32)), (256, (32, 64)), (8, (8, 16)), (8192, (64, 128)), (2048, (64, 128))):
        for block in blocks:
            for depth in (128, 64):
                row(tokens, block, depth, 12)
        row(tokens, blocks[-1], 128, 4)


PARTS = {part.__name__: part for part in (experts, token, products, tiles)}


def main() -> None:
    if part := os.environ.get("QUANTIZED_OPS_PART"):
        PARTS[part]()
        return
    flags = [word for word in sys.argv[1:] if word.startswith("--")]
    parts = [word for word in sys.argv[1:] if word not in flags] or [part for part in PARTS if part != "tiles"]
    if unknown := set(parts) - set(PARTS):
        raise UserError(f"{', '.join(unknown)}: unknown; choose of {', '.join(PARTS)}")
    forms = flags[0].removeprefix("--quantize=") if flags else "int8,fp8,int4"
    for part in parts:
        for form in forms.split(","):
            environment = {**os.environ, "QUANTIZED_OPS_PART": part, "QUANTIZED_OPS_FORM": form}
            start = time.perf_counter()
            command = [sys.executable, "-m", "benchmarks.quantized_ops"]
            try:
                code = subprocess.run(command, env=environment, timeout=LIMIT).returncode
            except subprocess.TimeoutExpired:
                code = "out of time"
            spent = time.perf_counter() - start
            print(f"{part} {form}: {'done' if code == 0 else code} after {spent:.0f} s\n", flush=True)


if __name__ == "__main__":
    main()
