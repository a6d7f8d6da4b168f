"""Check and time what a training step of the 21B model consists of, on one GPU: attention of rows, and the experts.

    python -m benchmarks.train_ops attention [--rows=2] [--length=8192] [--documents=1]
    python -m benchmarks.train_ops experts [--tokens=16384] [--backends batched mosaic] [--rank=32]
    python -m benchmarks.train_ops sweep

A row is the time forward, and of the gradient without it. TFLOP/s count what the causal mask and the routing ask for:
of attention's gradient five products, of the experts' two or, where weights learn, four; none of adapters. Errors are
those against "xla" of a row of 1,024 tokens, or "dense" of 256 tokens, of "mosaic" 576.
"""

from __future__ import annotations

import argparse
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.prefill_ops import distance, seconds
from ernie_jax.ops import Adapted, grouped_mlp, packed_attention, packed_kernel

D, F, E, TOP, KV, GROUP, HEAD = 2560, 1536, 64, 6, 4, 5, 128


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    make = jax.jit(lambda key: (jax.random.normal(key, shape, jnp.bfloat16) * scale).astype(jnp.bfloat16))
    return make(jax.random.key(seed))


def guarded(row):
    """Print what a row returns, or why it failed."""

    @functools.wraps(row)
    def run(label, *args, **options):
        try:
            print(f"{label:44} {row(*args, **options)}", flush=True)
        except Exception as error:  # the next row stands for itself
            print(f"{label:44} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)

    return run


def segments_of(rows: int, length: int, documents: int) -> jax.Array:
    """Cut rows into documents whose lengths differ by a factor of three at most."""
    rng = np.random.default_rng(0)
    sizes = rng.uniform(1, 3, (rows, documents))
    ends = np.ceil(np.cumsum(sizes, axis=1) / sizes.sum(1, keepdims=True) * length)
    return jnp.asarray((np.arange(length) >= ends[:, :, None]).sum(1), jnp.int32)


def cudnn(q, k, v, segments):
    """cuDNN's attention, of rows that are one document."""
    flat = q.reshape(*q.shape[:2], -1, HEAD)
    return jax.nn.dot_product_attention(flat, k, v, is_causal=True, implementation="cudnn").reshape(q.shape)


def cudnn_packed(documents, q, k, v, segments):
    """cuDNN's attention with offsets of up to so many documents a row, which JAX's public function does not take."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    length = segments.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = jnp.sort(jnp.where(begins, index, length), axis=1)[:, :documents]
    ends = jnp.concatenate([starts[:, 1:], jnp.full_like(starts[:, :1], length)], axis=1)
    real = starts < length
    sizes = jnp.where(real, ends - starts, -1).astype(jnp.int32)
    count = real.sum(1, keepdims=True)
    offsets = jnp.pad(jnp.where(real, starts, -1), ((0, 0), (0, 1)), constant_values=-1)
    offsets = jnp.where(jnp.arange(documents + 1) == count, length, offsets).astype(jnp.int32)
    out = fused.dot_product_attention(
        q.reshape(*q.shape[:2], -1, HEAD), k, v, q_seqlen=sizes, kv_seqlen=sizes, q_offsets=offsets,
        kv_offsets=offsets, scale=HEAD**-0.5, mask_type=fused.MaskType.PADDING_CAUSAL,
    )  # fmt: skip
    return out.reshape(q.shape)


@guarded
def time_attention(attend, rows, length, documents):
    def draw(length):
        q, pull = (normal(seed, rows, length, KV, GROUP, HEAD) for seed in (0, 1))
        return q, *(normal(seed, rows, length, KV, HEAD) for seed in (2, 3)), segments_of(rows, length, documents), pull

    def gradient(q, k, v, segments, pull):
        return jax.grad(lambda *qkv: jnp.vdot(attend(*qkv, segments), pull).astype(jnp.float32), (0, 1, 2))(q, k, v)

    *given, pull = draw(1024)
    found = [attend(*given), *jax.jit(gradient)(*given, pull)]
    reference = functools.partial(packed_attention, backend="xla")
    wide = [x.astype(jnp.float32) for x in given[:3]]
    with jax.default_matmul_precision("highest"):
        expected, back = jax.vjp(lambda *qkv: reference(*qkv, given[3]), *wide)
        expected = [expected, *back(pull.astype(jnp.float32))]
    errors = " ".join(f"{distance(out, np.asarray(exact)):.1e}" for out, exact in zip(found, expected, strict=True))

    *given, pull = draw(length)
    step, gradient = jax.jit(attend), jax.jit(gradient)
    forward, both = seconds(lambda: step(*given)), seconds(lambda: gradient(*given, pull))
    lengths = np.unique(np.asarray(given[3]) + 1000 * np.arange(rows)[:, None], return_counts=True)[1]
    products = 2 * KV * GROUP * HEAD * float(np.sum(lengths * (lengths + 1.0) / 2))  # of one of the products
    rate = [count * products / took / 1e12 for count, took in ((2, forward), (5, both - forward))]
    return (
        f"{forward * 1e3:7.3f} ms {rate[0]:4.0f} TFLOP/s | gradient {(both - forward) * 1e3:7.3f} ms "
        f"{rate[1]:4.0f} | errors {errors}"
    )


@guarded
def time_kernels(rows, length, kernel, **blocks):
    """Time one of our attention's three kernels."""
    q, pull = (normal(seed, rows, length, KV * GROUP, HEAD) for seed in (0, 1))
    k, v = (normal(seed, rows, length, KV, HEAD) for seed in (2, 3))
    first = jnp.zeros((rows, length), jnp.int32)
    out, sums = packed_kernel.attend(q, k, v, first)
    dots = jnp.einsum("bqnh,bqnh->bnq", out.astype(jnp.float32), pull.astype(jnp.float32))
    products = 2 * KV * GROUP * HEAD * rows * length * (length + 1) / 2
    calls = {
        "attend": (2, lambda **o: packed_kernel.attend(q, k, v, first, **o)),
        "pull_queries": (3, lambda **o: packed_kernel.pull_queries(q, k, v, first, pull, sums, dots, **o)),
        "pull_keys": (4, lambda **o: packed_kernel.pull_keys(q, k, v, first + length - 1, pull, sums, dots, **o)),
    }
    count, call = calls[kernel]
    took = seconds(lambda: call(**blocks))
    return f"{took * 1e3:7.3f} ms {count * products / took / 1e12:4.0f} TFLOP/s of {count} products"


@guarded
def time_experts(backend, tokens, learns=False, rank=0):
    def draw(tokens):
        rng = np.random.default_rng(0)
        chosen = jnp.asarray(np.argsort(rng.random((tokens, E)), axis=1)[:, :TOP], jnp.int32)
        weights = jnp.asarray(rng.dirichlet(np.ones(TOP), size=tokens), jnp.bfloat16)
        return normal(0, tokens, D), chosen, weights, normal(1, tokens, D)

    gate_up, down = normal(2, E, 2, F, D, scale=D**-0.5), normal(3, E, D, F, scale=F**-0.5)
    adapters = []
    if rank:
        adapters = [(normal(4, E, rank, D, scale=D**-0.5), normal(5, E, 2, F, rank, scale=rank**-0.5))]
        adapters += [(normal(6, E, rank, F, scale=F**-0.5), normal(7, E, D, rank, scale=rank**-0.5))]
    wanted = (0, 2, 3, 4) if learns else (0, 2, 5)

    def forward(backend, x, chosen, weights, gate_up, down, adapters):
        if adapters:
            gate_up, down = (Adapted(w, *pair) for w, pair in zip((gate_up, down), adapters, strict=True))
        return grouped_mlp(x, chosen, weights, gate_up, down, backend)

    def gradient(backend, x, chosen, weights, gate_up, down, adapters, pull):
        def loss(*given):
            return jnp.vdot(forward(backend, *given), pull).astype(jnp.float32)

        return jax.grad(loss, wanted)(x, chosen, weights, gate_up, down, adapters)

    *given, pull = draw(256 if backend != "mosaic" else 576)
    experts = gate_up, down, adapters
    found, expected = (
        jax.tree.leaves(jax.jit(functools.partial(gradient, name))(*given, *experts, pull))
        for name in (backend, "dense")
    )
    errors = " ".join(f"{distance(out, np.asarray(exact)):.1e}" for out, exact in zip(found, expected, strict=True))
    *given, pull = draw(tokens)
    step, both = (jax.jit(functools.partial(call, backend)) for call in (forward, gradient))
    first = seconds(lambda: step(*given, *experts), 10)
    compiled = both.lower(*given, *experts, pull).compile()
    took = seconds(lambda: compiled(*given, *experts, pull), 10)
    products = 2 * tokens * TOP * 3 * F * D
    rate = [count * products / time / 1e12 for count, time in ((1, first), (2 + learns, took))]
    return (
        f"{first * 1e3:7.2f} ms {rate[0]:4.0f} TFLOP/s | with gradient {took * 1e3:7.2f} ms {rate[1]:4.0f} | "
        f"temporaries {compiled.memory_analysis().temp_size_in_bytes / 1e9:.2f} GB | errors {errors}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["attention", "experts", "sweep"])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=1, help="of a row")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--backends", nargs="+", default=["mosaic", "batched"])
    parser.add_argument("--rank", type=int, default=32, help="of adapters of the experts")
    flags = parser.parse_args()
    print(jax.devices()[0].device_kind)
    if flags.part == "attention":
        shape = flags.rows, flags.length, flags.documents
        attends = {
            "mosaic": functools.partial(packed_attention, backend="mosaic"),
            "cudnn packed": functools.partial(cudnn_packed, max(flags.documents, 2)),
        }
        if flags.documents == 1:
            attends["cudnn"] = cudnn
        for name, attend in attends.items():
            time_attention(f"{name} {flags.rows} x {flags.length}, {flags.documents} documents", attend, *shape)
    if flags.part == "experts":
        cases = {"weights frozen": {}, "weights learn": {"learns": True}, "adapters learn": {"rank": flags.rank}}
        for backend, (name, options) in itertools.product(flags.backends, cases.items()):
            time_experts(f"{backend} {flags.tokens} tokens, {name}", backend, flags.tokens, **options)
    if flags.part == "sweep":
        shape = flags.rows, flags.length
        for block, steps in ((128, 2), (128, 3), (64, 4)):
            time_kernels(f"attend block {block} steps {steps}", *shape, kernel="attend", block=block, steps=steps)
        for kernel, block, steps in itertools.product(("pull_queries", "pull_keys"), (64, 128), (2, 3)):
            time_kernels(f"{kernel} block {block} steps {steps}", *shape, kernel=kernel, block=block, steps=steps)


if __name__ == "__main__":
    main()
