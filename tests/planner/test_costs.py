"""Bytes, operations and exchanged bytes against numbers worked out by hand, and against compiled programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax.engine.aot import decode_shape, lower_step, prefill_shape
from ernie_jax.planner import costs
from ernie_jax.planner.costs import Cost, decode_load, link_bytes, prefill_load, roofline, step_collectives, step_cost
from ernie_jax.planner.hlo import Collective, collectives
from ernie_jax.planner.topology import parse_topology
from ernie_jax.sharding import PRESETS, make_layout

BF16 = jnp.dtype(jnp.bfloat16)

# The tiny model of tests/conftest.py: D 64, V 320, 3 layers of which the first is dense, 8 query and 2 key/value heads
# of 16, F 96, 8 experts of width 32 of which a token takes 2, shared experts of width 64, tied embedding.
ATTENTION = 2 * (4 + 2) * 16 * 64 + 64 * 128  # a layer's qkv and out: 20,480
DENSE = 3 * 64 * 96  # 18,432
SHARED = 3 * 64 * 64  # 12,288
EXPERTS = 8 * 3 * 64 * 32  # 49,152
ROUTER = 8 * 64
EMBEDDING = 320 * 64
NORMS = 7 * 64


def layout_of(config, name, devices, mesh=None):
    return make_layout(config, parse_topology(f"h100:{devices}").stand_ins(), mesh, name)


def test_one_device_decode(tiny_config):
    layout = layout_of(tiny_config, "single", 1)
    whole = 3 * ATTENTION + DENSE + 2 * SHARED + EMBEDDING + NORMS
    assert costs.weight_bytes(tiny_config, BF16, layout) == 2 * (whole + 2 * EXPERTS) + 4 * 2 * (ROUTER + 8)
    assert costs.token_bytes(tiny_config, BF16, layout) == 3 * 2 * 2 * 16 * 2
    assert costs.token_bytes(tiny_config, jnp.dtype(jnp.int8), layout) == 3 * 2 * 2 * (16 + 4)  # and a scale
    assert costs.token_bytes(tiny_config, jnp.dtype(jnp.float8_e4m3fn), layout) == 3 * 2 * 2 * 16

    cost = step_cost(tiny_config, BF16, layout, decode_load(layout, batch=4, context=100))
    reached = 1 - (6 / 8) ** 4  # of the experts, by one of 4 tokens that choose 2 of 8 each
    assert cost.weights == pytest.approx(2 * (whole + reached * 2 * EXPERTS) + 4 * 2 * (ROUTER + 8))
    assert cost.cache == (4 * 100 + 4) * 384
    small = step_cost(tiny_config, BF16, layout, decode_load(layout, batch=4, context=100), jnp.dtype(jnp.int8))
    assert small.cache == (4 * 100 + 4) * 240 and small.weights == cost.weights
    matrices = 3 * ATTENTION + DENSE + 2 * (SHARED + EXPERTS * 2 / 8 + ROUTER) + EMBEDDING
    assert cost.flops == pytest.approx(4 * (2 * matrices + 3 * 100 * 2 * 2 * 8 * 16))
    assert step_collectives(tiny_config, BF16, layout, decode_load(layout, 4, 100), "gpu") == []


def test_an_int8_embedding(tiny_config):
    """A byte an element and a scale a row, cut by the vocabulary as the weight is."""
    int8 = dataclasses.replace(tiny_config, quantize="int8")
    more = dataclasses.replace(int8, quantize_embedding=True)
    for name, devices in (("single", 1), ("expert", 4)):
        layout = layout_of(tiny_config, name, devices)
        saved = (EMBEDDING - 4 * 320) // devices
        sizes = [costs.weight_bytes(config, BF16, layout) for config in (int8, more)]
        assert sizes[0] - sizes[1] == saved
        one, other = (step_cost(config, BF16, layout, decode_load(layout, 4, 100)) for config in (int8, more))
        assert one.weights - other.weights == pytest.approx(saved) and one.flops == other.flops


def test_one_device_prefill(tiny_config):
    layout = layout_of(tiny_config, "single", 1)
    cost = step_cost(tiny_config, BF16, layout, prefill_load(chunk=3, context=10))
    matrices = 3 * (3 * ATTENTION + DENSE + 2 * (SHARED + EXPERTS / 4 + ROUTER)) + EMBEDDING  # logits of one row
    attended = 8 + 9 + 10
    assert cost.flops == pytest.approx(2 * matrices + 3 * attended * 2 * 2 * 8 * 16)
    assert cost.cache == (10 + 3) * 384


def test_experts_over_four_devices(tiny_config):
    """2 key/value heads on 4 devices: 2 groups of sequences, attention halved, everything else quartered."""
    layout = layout_of(tiny_config, "expert", 4)
    assert (layout.groups, layout.size("kv_head"), layout.size("expert")) == (2, 2, 4)
    load = decode_load(layout, batch=5, context=100)
    assert (load.tokens, load.group_tokens, load.cached) == (5, 3, 300)
    cost = step_cost(tiny_config, BF16, layout, load)
    reached = 1 - (6 / 8) ** 5
    local = 3 * ATTENTION / 2 + (DENSE + 2 * SHARED + EMBEDDING + reached * 2 * EXPERTS) / 4 + NORMS
    assert cost.weights == pytest.approx(2 * local + 4 * 2 * (ROUTER + 8))
    assert cost.cache == (300 + 3) * 384 / 2
    everywhere = (DENSE + 2 * (SHARED + EXPERTS / 4) + EMBEDDING) / 4 + 2 * ROUTER
    assert cost.flops == pytest.approx(5 * 2 * everywhere + 3 * 2 * 3 * ATTENTION / 2 + 300 * 3 * 2 * 2 * 8 * 16 / 2)
    # The embedding and two sums a layer, of 5 tokens of width 64.
    assert step_collectives(tiny_config, BF16, layout, load, "gpu") == [Collective("all-reduce", 5 * 64 * 2, 7, 4)]


def test_tensor_slices_divide_experts_too(tiny_config):
    layout = layout_of(tiny_config, "tensor", 2)
    cost = step_cost(tiny_config, BF16, layout, decode_load(layout, 4, 100))
    reached = 1 - (6 / 8) ** 4
    local = (3 * ATTENTION + DENSE + 2 * SHARED + EMBEDDING + reached * 2 * EXPERTS) / 2 + NORMS
    assert cost.weights == pytest.approx(2 * local + 4 * 2 * (ROUTER + 8))


def test_an_exchange_moves_tokens_not_sums(tiny_config):
    layout = layout_of(tiny_config, "exchange", 4)
    load = decode_load(layout, batch=8, context=100)
    assert load.group_tokens == 2
    cost = step_cost(tiny_config, BF16, layout, load)
    reached = 1 - (6 / 8) ** 8
    # All but experts and vocabulary on every device.
    local = 3 * ATTENTION + DENSE + 2 * SHARED + (EMBEDDING + reached * 2 * EXPERTS) / 4 + NORMS
    assert cost.weights == pytest.approx(2 * local + 4 * 2 * (ROUTER + 8))
    own = 3 * ATTENTION + DENSE + 2 * (SHARED + ROUTER)
    assert cost.flops == pytest.approx(
        2 * 2 * own + 8 * 2 * (2 * EXPERTS / 4 + EMBEDDING) / 4 + 200 * 3 * 2 * 2 * 8 * 16
    )
    # The embedding and the hidden states before the head are summed. In each of 2 layers choices and weights are
    # gathered, 4 bytes each, and rows go both ways: padded, for each of 4 shards as many as there are tokens.
    summed, gathered = Collective("all-reduce", 8 * 64 * 2, 2, 4), Collective("all-gather", 8 * 2 * 2 * 4, 2, 4)
    padded = Collective("all-to-all", 4 * 2 * 64 * 2, 4, 4)
    assert step_collectives(tiny_config, BF16, layout, load, "gpu") == [padded, summed, gathered]
    # Ragged: a shard has 2 of 8 experts, so that a token with 2 of them reaches 4 (1 - 6/8 * 5/7) = 13/7 shards.
    ragged = Collective("ragged-all-to-all", round(2 * 13 / 7) * 64 * 2, 4, 4)
    assert step_collectives(tiny_config, BF16, layout, load, "tpu") == [summed, ragged, gathered]


def test_multi_token_prediction_is_kept_but_not_read(tiny_config):
    layout = layout_of(tiny_config, "single", 1)
    more = dataclasses.replace(tiny_config, num_nextn_predict_layers=1)
    extra = 2 * (2 * 64 + 64 * 128 + ATTENTION + DENSE + 2 * 64)
    weights = [costs.weight_bytes(config, BF16, layout) for config in (tiny_config, more)]
    assert weights[1] - weights[0] == extra == costs.unused_bytes(more, BF16, layout)
    load = decode_load(layout, 4, 100)
    assert step_cost(more, BF16, layout, load) == step_cost(tiny_config, BF16, layout, load)


def test_an_untied_table_is_not_read_whole(tiny_config):
    layout = layout_of(tiny_config, "single", 1)
    untied = dataclasses.replace(tiny_config, tie_word_embeddings=False)
    weights = [costs.weight_bytes(config, BF16, layout) for config in (tiny_config, untied)]
    assert weights[1] - weights[0] == 2 * EMBEDDING
    load = decode_load(layout, 4, 100)
    assert step_cost(untied, BF16, layout, load) == step_cost(tiny_config, BF16, layout, load)


def test_roofline_takes_the_largest_of_three():
    topology = parse_topology("v5e:2x4")  # 819 GB/s, 197 TFLOP/s, a corner sends on 2 ports of 50 GB/s
    reduce = Collective("all-reduce", 10**9, 4, 8)  # each sends 2 * 7/8 of a GB, four times
    found = roofline(Cost(8e9, 0.19e9, 19.7e12), [reduce], topology)
    assert (found.memory, found.compute, found.links, found.sent) == pytest.approx((0.01, 0.1, 0.07, 7e9))
    assert (found.bound, found.seconds) == ("compute", found.compute)
    assert found.serial_seconds == pytest.approx(0.18)
    assert roofline(Cost(8.19e11, 0, 0), [reduce], topology).bound == "memory"
    assert roofline(Cost(0, 0, 0), [reduce], topology).bound == "links"
    assert roofline(Cost(1, 1, 1), [], parse_topology("v5e:1x1")).links == 0


@pytest.mark.parametrize(
    ("kind", "group", "sent"),
    [
        ("all-reduce", 8, 2 * 3 / 4 * 1000 / 2),  # 4 chips; each of two devices carries half of the chip's sum
        ("all-gather", 8, 3 / 4 * 1000 / 2),
        ("all-to-all", 8, 6 / 8 * 1000),  # a quarter stays on the chip
        ("all-reduce", 2, 0),
        ("all-to-all", 2, 0),
    ],
)
def test_what_two_devices_of_a_chip_settle_stays_on_it(kind, group, sent):
    items = [Collective(kind, 1000, 3, group)]
    assert link_bytes(items, parse_topology("tpu7x:2x2x1")) == pytest.approx(3 * sent)
    fraction = (2 if kind == "all-reduce" else 1) * (group - 1) / group
    assert link_bytes(items, parse_topology("v5p:2x2x2")) == pytest.approx(3 * 1000 * fraction)


@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if preset.serves])
@pytest.mark.parametrize("step", ["decode", "prefill"])
def test_counts_agree_with_the_compiled_program(tiny_config, preset, step):
    """In float32, which XLA:CPU leaves alone: bytes of weights and pages, and every collective."""
    dtype = jnp.dtype(np.float32)
    config = tiny_config
    layout = make_layout(config, jax.devices()[:4], None, preset)
    shape, load = {
        "decode": (decode_shape(config, layout, 8, 512), decode_load(layout, 8, 512)),
        "prefill": (prefill_shape(config, layout, 64, 512), prefill_load(64, 512)),
    }[step]
    compiled = lower_step(config, layout, dtype, shape, group_pages=9).compile()
    weights = costs.weight_bytes(config, dtype, layout)
    pages = 9 * 128 * costs.token_bytes(config, dtype, layout)
    inputs = compiled.memory_analysis().argument_size_in_bytes - weights - pages
    assert 0 < inputs < 4096
    found = collectives(compiled.as_text())
    assert set(found) == set(step_collectives(config, dtype, layout, load, "cpu"))
