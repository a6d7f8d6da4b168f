"""TPU backends of ops, compiled by libtpu for real slices at full size; nothing runs, so no numbers are checked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ernie_jax.ops import (
    Quantized,
    RaggedBatch,
    exchange_mlp,
    grouped_mlp,
    int4,
    packed_attention,
    paged_attention,
    quantized_specs,
)
from ernie_jax.planner.topology import parse_topology

AXES = ("data", "expert")
MB = 1e6
TOPOLOGIES = ["v5e:2x4", "v6e:2x4", "v5p:2x2x2", "tpu7x:2x2x1"]


@functools.cache
def mesh_of(topology):
    devices = np.array(parse_topology(topology).compile_devices())
    return Mesh(devices.reshape(2, -1), AXES, axis_types=(AxisType.Auto,) * 2)


def compiled(topology, function, inputs, out_specs, donate=()):
    """Compile a shard's function; inputs are (shape, dtype, spec)."""
    mesh = mesh_of(topology)
    arguments = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, spec)) for s, d, spec in inputs]
    specs = tuple(spec for _, _, spec in inputs)
    sharded = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
    return jax.jit(sharded, donate_argnums=donate).lower(*arguments).compile()


def attention(topology, tokens, kv_heads, group, dtype=jnp.bfloat16, num_pages=256):
    rows, count = min(tokens, 64), mesh_of(topology).size
    heads, integers = P(None, AXES), jnp.int32

    def step(q, k, v, pages, *fields):
        return paged_attention(q, k, v, pages, RaggedBatch(*fields, max_query=tokens), "rpa")

    shapes = [(tokens,), (tokens,), (rows + 1,), (rows,), (rows, 64)]
    inputs = [
        ((tokens, kv_heads * count, group, 128), jnp.bfloat16, heads),
        ((tokens, kv_heads * count, 128), jnp.bfloat16, heads),
        ((tokens, kv_heads * count, 128), jnp.bfloat16, heads),
        ((num_pages, 128, 2 * kv_heads * count, 128), dtype, P(None, None, AXES)),
        *((shape, integers, P()) for shape in shapes),
    ]
    return compiled(topology, step, inputs, (heads, P(None, None, AXES)), donate=3)


# 21B on 4 or more, 2 and 1 shards of heads; 0.3B; 300B.
HEADS = [(1, 5), (2, 5), (4, 5), (2, 8), (8, 8)]


@pytest.mark.parametrize(
    ("topology", "tokens", "heads"),
    [("v5e:2x4", tokens, heads) for tokens in (1, 64, 512, 2048) for heads in HEADS]
    + [(topology, 64, (1, 5)) for topology in TOPOLOGIES[1:]],
)
def test_rpa_compiles_and_writes_the_cache_in_place(topology, tokens, heads):
    program = attention(topology, tokens, *heads)
    cache = 256 * 128 * 2 * heads[0] * 128 * 2
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == cache
    assert memory.temp_size_in_bytes < cache / 8
    assert "ragged_paged_attention_kernel" in program.as_text()


@pytest.mark.parametrize(
    ("topology", "tokens", "heads"),
    [("v5e:2x4", 1, (2, 5)), ("v5e:2x4", 512, (4, 5)), ("v5e:2x4", 512, (8, 8))]
    + [(topology, 64, (4, 5)) for topology in TOPOLOGIES[1:]],
)
def test_rpa_takes_an_fp8_cache(topology, tokens, heads):
    memory = attention(topology, tokens, *heads, jnp.float8_e4m3fn).memory_analysis()
    assert memory.alias_size_in_bytes == 256 * 128 * 2 * heads[0] * 128
    assert memory.temp_size_in_bytes < 256 * 128 * 2 * heads[0] * 128 / 8


def experts(topology, tokens, k, count, model, width, split_width):
    spec = P(None, None, AXES) if split_width else P(AXES)
    first = 0 if split_width else count // mesh_of(topology).size

    def layer(x, chosen, weights, gate_up, down):
        return grouped_mlp(x, chosen, weights, gate_up, down, "gmm", jax.lax.axis_index(AXES) * first)

    inputs = [
        ((tokens, model), jnp.bfloat16, P()),
        ((tokens, k), jnp.int32, P()),
        ((tokens, k), jnp.float32, P()),
        ((count, 2, width, model), jnp.bfloat16, spec),
        ((count, model, width), jnp.bfloat16, spec),
    ]
    return compiled(topology, layer, inputs, P())


@pytest.mark.parametrize(
    ("topology", "model", "width", "k", "split_width", "temporaries"),
    [
        *((topology, 2560, 1536, 6, False, 150 * MB) for topology in TOPOLOGIES),
        ("v5e:2x4", 2560, 1536, 6, True, 150 * MB),  # 192 of an expert's width a shard: not a multiple of the lanes
        ("v5e:4x4", 8192, 3584, 8, False, 600 * MB),
    ],
)
def test_gmm_compiles_without_a_copy_of_the_weights(topology, model, width, k, split_width, temporaries):
    program = experts(topology, 2048, k, 64, model, width, split_width)
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    local = f"[64,{model},{width // 8}]" if split_width else f"[{64 // mesh_of(topology).size},{model},{width}]"
    assert not [line for line in text.splitlines() if " copy(" in line and local in line]
    assert program.memory_analysis().temp_size_in_bytes < temporaries


# Experts' gate and up of one token, experts' down of many, the dense layer's down, a shard of the shared experts' down.
@pytest.mark.parametrize(
    ("topology", "tokens", "batch", "count", "outputs", "inner"),
    [
        *((topology, 1, 8, 2, 1536, 2560) for topology in TOPOLOGIES),
        ("v5e:2x4", 128, 16, 1, 2560, 1536),
        ("v5e:2x4", 512, 1, 1, 2560, 12288),
        ("v5e:2x4", 64, 1, 1, 2560, 384),
    ],
)
def test_int4_compiles_without_temporaries(topology, tokens, batch, count, outputs, inner):
    def product(x, values, scales):
        return int4.by_kernel(x, Quantized(values, scales), jnp.bfloat16)

    weight = quantized_specs("int4", (batch, count, outputs, inner), 3)
    inputs = [((batch, tokens, inner), jnp.bfloat16, P())]
    inputs += [(part.shape, part.dtype, P()) for part in jax.tree.leaves(weight)]
    program = compiled(topology, product, inputs, P())
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 1
    rows = max(tokens, 16)
    assert program.memory_analysis().temp_size_in_bytes < 4 * batch * rows * inner * 2 + 1e6


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5e:4x4"])
def test_ragged_exchange_compiles(topology):
    shards = mesh_of(topology).size
    local = 64 // shards

    def layer(x, chosen, weights, gate_up, down):
        def compute(*rows):
            return grouped_mlp(*rows, gate_up, down, "gmm", jax.lax.axis_index(AXES) * local)

        return exchange_mlp(x, chosen, weights, compute, axes=AXES, experts_per_shard=local, backend="ragged")

    inputs = [
        ((512 * shards, 2560), jnp.bfloat16, P(AXES)),
        ((512 * shards, 6), jnp.int32, P(AXES)),
        ((512 * shards, 6), jnp.float32, P(AXES)),
        ((64, 2, 1536, 2560), jnp.bfloat16, P(AXES)),
        ((64, 2560, 1536), jnp.bfloat16, P(AXES)),
    ]
    text = compiled(topology, layer, inputs, P(AXES)).as_text()
    assert "ragged-all-to-all" in text
    assert "all-reduce" not in text


@pytest.mark.parametrize("topology", ["v5e:2x4", "tpu7x:2x2x1"])
def test_attention_of_packed_rows_compiles(topology):
    """With its gradient, of rows of 8,192 tokens; scores are never held."""

    def layer(q, k, v, segments):
        def total(q, k, v):
            return packed_attention(q, k, v, segments, "splash").astype(jnp.float32).sum()

        return jax.grad(total, (0, 1, 2))(q, k, v)

    rows, kv_heads, group = mesh_of(topology).size, 4, 5
    inputs = [
        ((rows, 8192, kv_heads, group, 128), jnp.bfloat16, P(AXES)),
        *[((rows, 8192, kv_heads, 128), jnp.bfloat16, P(AXES))] * 2,
        ((rows, 8192), jnp.int32, P(AXES)),
    ]
    program = compiled(topology, layer, inputs, (P(AXES),) * 3)
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 3
    assert program.memory_analysis().temp_size_in_bytes < kv_heads * group * 8192 * 8192
