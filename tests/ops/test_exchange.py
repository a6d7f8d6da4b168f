"""Exchange of tokens between 8 shards against a float64 reference, on fresh random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ernie_jax.ops import EXCHANGE_BACKENDS, default_exchange_backend, exchange_mlp, grouped_mlp
from tests.ops.test_experts import draw, reference

SHARDS, K, EXPERTS = 8, 3, 16
AXES = ("data", "expert")


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all`, which XLA lacks on CPUs, from its documentation."""
    me = jax.lax.axis_index(axis_name)
    operands, starts, sizes, ends = (
        jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)
    )
    row = jnp.arange(len(operand))
    for source in range(SHARDS):
        offset = row - starts[source, me]
        place = jnp.where((offset >= 0) & (offset < sizes[source, me]), ends[source, me] + offset, len(output))
        output = output.at[place].set(operands[source], mode="drop")
    # A receiver that expects other sizes than are sent to it would hang or corrupt memory on a chip.
    return jnp.where((recv_sizes == sizes[:, me]).all(), output, jnp.nan)


def exchanged(backend, mesh, experts="dense"):
    local = EXPERTS // SHARDS

    def shard(x, chosen, weights, gate_up, down):
        def compute(*rows):
            return grouped_mlp(*rows, gate_up, down, experts, jax.lax.axis_index(AXES) * local)

        return exchange_mlp(x, chosen, weights, compute, axes=AXES, experts_per_shard=local, backend=backend)

    return jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=(P(AXES),) * 5, out_specs=P(AXES), check_vma=False))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4, 1), (*AXES, "tensor"), axis_types=(AxisType.Auto,) * 3)


def route(rng, routing, chosen):
    if routing == "skewed":  # every token of every shard chooses the same experts, of one and of two shards
        chosen[:] = [6, 7, 12]
    if routing == "padding":  # one shard has nothing but padding, another some, some tokens use fewer experts
        chosen[:5] = EXPERTS
        chosen[7] = [-1, EXPERTS, 1000]
        chosen[20, 1:] = EXPERTS
    return chosen


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("routing", ["random", "skewed", "padding"])
@pytest.mark.parametrize("backend", EXCHANGE_BACKENDS)
def test_matches_float64(backend, routing, dtype, bound, mesh, rng, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
    x, chosen, weights, gate_up, down = draw(rng, 5 * SHARDS, K, EXPERTS, 24, 32, dtype)
    chosen = route(rng, routing, chosen)
    out = exchanged(backend, mesh)(x, chosen, weights.astype(jnp.float32), gate_up, down)
    assert out.dtype == dtype
    expected = reference(x, chosen, weights, gate_up, down)
    assert np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected) < bound
    padding = ((chosen < 0) | (chosen >= EXPERTS)).all(1)
    np.testing.assert_array_equal(np.asarray(out, np.float32)[padding], 0)


def test_sorted_experts_exchange_long_prompts(mesh, rng):
    x, chosen, weights, gate_up, down = draw(rng, 50 * SHARDS, K, EXPERTS, 24, 32, jnp.float32)
    out = exchanged("padded", mesh, "blocks")(x, chosen, weights, gate_up, down)
    np.testing.assert_allclose(out, reference(x, chosen, weights, gate_up, down), atol=2e-5)


def test_three_collectives(mesh, rng):
    inputs = draw(rng, 5 * SHARDS, K, EXPERTS, 24, 32, jnp.float32)
    text = exchanged("padded", mesh).lower(*inputs).compile().as_text()
    assert [text.count(f" {kind}(") for kind in ("all-gather", "all-to-all", "all-reduce")] == [1, 2, 0]


def test_only_tpus_exchange_ragged_rows_by_default():
    assert [default_exchange_backend(platform) for platform in ("cpu", "gpu", "tpu")] == ["padded", "padded", "ragged"]
