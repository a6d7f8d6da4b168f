"""Check and time our Mosaic kernels at the 21B model's sizes on one Hopper GPU: experts, and attention of many tokens.

    python benchmarks/prefill_ops.py [experts] [attention] [sweep]

Without arguments all parts run, the most important first. Each is a process of its own with a time limit, so that a
kernel that hangs costs only its part, and each row stands for itself: one that fails says so. Errors are those of a few
tokens or rows against float64. TFLOP/s count what the routing and the causal mask ask for, not padding; TB/s count the
weights of each chosen expert once.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from ernie_jax.engine.batching import aligned
from ernie_jax.ops import ATTENTION_BACKENDS, RaggedBatch, prefill_attention
from ernie_jax.ops.mosaic import Tiles, by_mosaic
from ernie_jax.ops.prefill_attention import ALIGNMENT

D, F, E, TOP, KV, GROUP, HEAD, PAGE = 2560, 1536, 64, 6, 4, 5, 128, 128
BOUND = 6e-3  # bfloat16 in and out, hidden values rounded up to four times
LIMITS = {"experts": 150, "attention": 180, "sweep": 240}  # seconds


def seconds(call, inner: int = 10, repeats: int = 3) -> float:
    """Return the time of a call that returns arrays: the median over batches of calls that queue up."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            out = call()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / inner)
    return float(np.median(times))


def normal(seed: int, shape: tuple[int, ...], scale: float) -> jax.Array:
    make = jax.jit(lambda key: (jax.random.normal(key, shape, jnp.bfloat16) * scale).astype(jnp.bfloat16))
    return make(jax.random.key(seed))


def distance(out, expected) -> float:
    out = np.asarray(out, np.float64)
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))


def guarded(row):
    """Print what a row returns, or why it failed."""

    @functools.wraps(row)
    def run(*args):
        try:
            print(row(*args), flush=True)
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            which = [arg for arg in args if isinstance(arg, str | int | tuple)]
            print(f"  {which} FAILED {text[:300]}", flush=True)

    return run


def verdict(error: float) -> str:
    return f"error {error:.1e}" + ("" if error < BOUND else " WRONG")


def draw(tokens: int):
    """Return x, chosen and weights of evenly routed tokens."""
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    chosen = np.argsort(rng.random((tokens, E)), axis=1)[:, :TOP].astype(np.int32)
    weights = jnp.asarray(rng.dirichlet(np.ones(TOP), size=tokens), jnp.bfloat16)
    return normal(int(rng.integers(1 << 30)), (tokens, D), 1), jnp.asarray(chosen), weights


@functools.cache
def expert_weights():
    return normal(1, (E, 2, F, D), D**-0.5), normal(2, (E, D, F), F**-0.5)


def expected_mlp(x, chosen, weights, gate_up, down, tokens):
    """Return the float64 result of a few tokens."""
    x, weights = np.asarray(x[tokens], np.float64), np.asarray(weights[tokens], np.float64)
    out = np.zeros_like(x)
    for row, experts in enumerate(np.asarray(chosen)[np.asarray(tokens)]):
        for slot, e in enumerate(experts):
            gate, up = np.asarray(gate_up[e], np.float64) @ x[row]
            out[row] += weights[row, slot] * (np.asarray(down[e], np.float64) @ (gate / (1 + np.exp(-gate)) * up))
    return out


def pair_flops(pairs: int, rows: int, inner: int) -> float:
    return 2.0 * pairs * rows * inner


def experts():
    print("experts, all of the backend: sort, products, weighted sum")

    @guarded
    def row(tokens):
        layers = 4 if tokens <= 512 else 1  # so many that no weight is still in the cache
        x, chosen, weights = draw(tokens)
        gate_up, down = expert_weights()
        run = jax.jit(functools.partial(by_mosaic, first_expert=0))
        arguments = x, chosen, weights, gate_up, down
        out = run(*arguments)
        some = np.random.default_rng().choice(tokens, min(tokens, 6), replace=False)
        error = distance(out[some], expected_mlp(*arguments, some))
        fresh = [(gate_up, down)] + [(gate_up + 0, down + 0) for _ in range(layers - 1)]

        @jax.jit
        def all_layers(x, chosen, weights, fresh):
            for _ in range(5):
                for pair in fresh:
                    x = x + 0 * by_mosaic(x, chosen, weights, *pair, 0)
            return x

        spent = seconds(lambda: all_layers(x, chosen, weights, fresh), inner=2) / (5 * layers)
        flops = pair_flops(tokens * TOP, 3 * F, D)
        read = 6.0 * F * D * len(np.unique(np.asarray(chosen)))
        return (
            f"  {tokens:6} tokens {spent * 1e6:8.1f} us {flops / spent / 1e12:6.0f} TFLOP/s "
            f"{read / spent / 1e12:5.2f} TB/s {verdict(error)}"
        )

    for tokens in (2, 8, 32, 64, 128, 256, 512, 2048, 8192, 16384):
        row(tokens)


def ours_case(pairs: int, tiles: Tiles, gates: int):
    """Return (jitted call, its arguments, check of its result) of one product of ours."""
    from ernie_jax.ops.mosaic_kernel import Tiling, grouped_product

    tiling = Tiling(*tiles)
    chosen = np.asarray(draw(pairs // TOP)[1]).reshape(-1)
    blocks, end = [], 0
    for expert, size in enumerate(np.bincount(chosen, minlength=E)):
        for at in range(0, size, tiling.block):
            blocks.append((expert, end + at, min(tiling.block, size - at)))
        end += -(-size // 8) * 8
    gate_up, down = expert_weights()
    weight = gate_up if gates == 2 else down[:, None]
    rows = normal(3, (end + tiling.block, weight.shape[-1]), 1)
    live = jnp.asarray([len(blocks)], jnp.int32)
    run = jax.jit(functools.partial(grouped_product, tiling=tiling))

    def check(out):
        some = np.random.default_rng().choice(len(blocks), 4, replace=False)
        expected = []
        for expert, row, _ in (blocks[i] for i in some):
            y = np.asarray(weight[expert], np.float64) @ np.asarray(rows[row], np.float64)
            expected.append(y[0] / (1 + np.exp(-y[0])) * y[1] if gates == 2 else y[0])
        return distance(out[np.asarray([blocks[i][1] for i in some])], np.stack(expected))

    return run, (rows, weight, jnp.asarray(np.array(blocks, np.int32)), live), check


def search(candidates):
    """Compile all candidates of a size at once, then check and time each; print the best two last."""
    expert_weights()
    for pairs in (384, 1536, 49152, 12288):
        for gates, name, outputs in ((2, "gate and up", 2 * F), (1, "down", D)):
            inner = D if gates == 2 else F
            flops, found = pair_flops(pairs, outputs, inner), []

            def prepare(tiles, pairs=pairs, gates=gates):
                run, arguments, check = ours_case(pairs, tiles, gates)
                return run.lower(*arguments).compile(), arguments, check

            with concurrent.futures.ThreadPoolExecutor(6) as pool:
                compiled = {tiles: pool.submit(prepare, tiles) for tiles in candidates(gates)}
            for tiles, future in compiled.items():

                @guarded
                def row(tiles, future, pairs=pairs, name=name, flops=flops, found=found, outputs=outputs, inner=inner):
                    run, arguments, check = future.result()
                    error = check(run(*arguments))
                    spent = seconds(lambda: run(*arguments))
                    if error < BOUND:
                        found.append((spent, tiles))
                    speed = f"{spent * 1e6:7.0f} us {flops / spent / 1e12:5.0f} TFLOP/s"
                    speed += f" {2 * outputs * inner * min(E, pairs) / spent / 1e12:5.2f} TB/s"
                    return f"  {pairs:6} pairs {name:11} ({', '.join(map(str, tiles))}) {speed} {verdict(error)}"

                row(tiles, future)
            compiled.clear()
            for spent, tiles in sorted(found)[:2]:
                print(f"BEST {pairs} pairs {name}: {tiles} {flops / spent / 1e12:.0f} TFLOP/s", flush=True)


def sweep():
    print("our grouped product: rows, columns, split, steps, band")

    def candidates(gates):
        bands = (12, 6, 3) if gates == 2 else (10, 5, 2)
        return [
            *(Tiles(64, 256, "rows", 4, band) for band in bands),
            *(Tiles(128, 128, "rows", 4, band) for band in (24, 8)),
            Tiles(64, 128, "rows", 6, 12),
            Tiles(64, 128, "tiles", 4, 12),
            Tiles(64, 128, "tiles", 3, 12),
        ]

    search(candidates)


def sequences(cases: list[tuple[int, int]], padding: int = 0):
    """Return q, pages and the batch of sequences of (cached before, new) tokens."""
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    news, ends = np.array([new for _, new in cases]), np.array([sum(case) for case in cases])
    width = -(-ends.max() // PAGE)
    pages = len(cases) * width + 1
    table = rng.permutation(pages - 1).reshape(len(cases), width)
    taken = aligned(news, ALIGNMENT)
    starts = np.append(0, np.cumsum(taken))
    total = taken.sum() + padding
    positions, rows = np.zeros(total, int), np.full(total, len(cases))
    for row, (start, new, end) in enumerate(zip(starts, news, ends, strict=False)):
        positions[start : start + new], rows[start : start + new] = np.arange(end - new, end), row
    batch = RaggedBatch(
        positions=positions.astype(np.int32),
        rows=rows.astype(np.int32),
        starts=starts.astype(np.int32),
        kv_lengths=ends.astype(np.int32),
        page_table=table.astype(np.int32),
        max_query=int(total if len(cases) == 1 else news.max()),
        alignment=ALIGNMENT,
    )
    q = normal(int(rng.integers(1 << 30)), (total, KV, GROUP, HEAD), 1)
    return q, normal(int(rng.integers(1 << 30)), (pages, PAGE, 2 * KV, HEAD), 1), jax.tree.map(jnp.asarray, batch)


def expected_attention(q, pages, batch, tokens):
    """Return the float64 result of a few tokens."""
    out = []
    for token in tokens:
        row, position = int(batch.rows[token]), int(batch.positions[token])
        kv = np.asarray(pages[batch.page_table[row]], np.float64).reshape(-1, KV, 2, HEAD)[: position + 1]
        scores = np.einsum("krh,skh->krs", np.asarray(q[token], np.float64), kv[:, :, 0]) * HEAD**-0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out.append(np.einsum("krs,skh->krh", weights / weights.sum(-1, keepdims=True), kv[:, :, 1]))
    return np.stack(out)


def attention():
    print("attention of prefill; mosaic: block, steps")

    @guarded
    def row(name, cases, padding, route, tiles):
        q, pages, batch = sequences(cases, padding)
        prefill_attention.BLOCK, prefill_attention.STEPS = tiles or (128, 2)
        run = jax.jit(ATTENTION_BACKENDS["xla"] if route == "xla" else prefill_attention.prefill)
        out = run(q, pages, batch)
        live = np.flatnonzero(batch.rows < len(cases))
        some = np.append(np.random.default_rng().choice(live, 8), live[[0, -1]])
        error = distance(out[some], expected_attention(q, pages, batch, some))
        if not bool(jnp.isfinite(out).all()):
            error = float("inf")
        spent = seconds(lambda: run(q, pages, batch), inner=5)
        flops = sum(4.0 * KV * GROUP * HEAD * (new * cached + new * (new + 1) / 2) for cached, new in cases)
        speed = flops / spent / 1e12
        label = f"{route} {tiles or ''}"
        return f"  {name:26} {label:16} {spent * 1e3:8.3f} ms {speed:6.0f} TFLOP/s {verdict(error)}"

    shapes = [
        ("1 x 8192", [(0, 8192)], 0),
        ("1 x 2048", [(0, 2048)], 0),
        ("1 x 8192 after 24576", [(24576, 8192)], 0),
        ("8 x 2048", [(0, 2048)] * 8, 0),
        ("ragged, padded", [(0, 1000), (77, 300), (5000, 129), (0, 128), (640, 1)], 50),
        ("1 x 777 after 100, padded", [(100, 777)], 1271),
    ]
    for shape in shapes:
        row(*shape, "mosaic", (128, 2))
    for shape in shapes[:4]:
        for tiles in ((128, 3), (64, 3), (64, 4)):
            row(*shape, "mosaic", tiles)
    row(*shapes[1], "xla", None)


PARTS = {part.__name__: part for part in (experts, attention, sweep)}


def main() -> None:
    if os.environ.get("PREFILL_OPS_PART"):
        PARTS[os.environ["PREFILL_OPS_PART"]]()
        return
    for part in sys.argv[1:] or PARTS:
        environment = {**os.environ, "PREFILL_OPS_PART": part}
        start = time.perf_counter()
        try:
            code = subprocess.run([sys.executable, __file__], env=environment, timeout=LIMITS[part]).returncode
        except subprocess.TimeoutExpired:
            code = "out of time"
        print(f"{part}: {'done' if code == 0 else code} after {time.perf_counter() - start:.0f} s\n", flush=True)


if __name__ == "__main__":
    main()
