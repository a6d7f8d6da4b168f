"""Whole models at full size, compiled for TPU slices: they fit, and no more is sent than the design says."""

import collections
import dataclasses
import time

import jax.numpy as jnp
import pytest

from ernie_jax.config import ModelConfig
from ernie_jax.engine.aot import decode_shape, lower_sample, lower_step, prefill_shape
from ernie_jax.engine.cache import PAGE_SIZE, bytes_per_token
from ernie_jax.planner.compilation import compile_all
from ernie_jax.planner.topology import parse_topology
from ernie_jax.sharding import make_layout

BATCH, CONTEXT = 64, 2048
# (model, slice, sharding, prompt tokens of the step or 0 for decoding)
STEPS = [
    ("21b-a3b", "v5e:2x4", "expert", 0),
    ("21b-a3b", "v5e:2x4", "expert", 512),
    ("21b-a3b", "v5e:4x4", "expert", 0),
    ("21b-a3b", "v5e:4x4", "expert", 512),
    ("21b-a3b", "v5p:2x2x2", "expert", 0),
    ("21b-a3b", "v5p:2x2x2", "expert", 512),
    ("21b-a3b", "v6e:2x4", "expert", 0),
    ("21b-a3b", "v6e:2x4", "expert", 512),
    ("21b-a3b", "tpu7x:2x2x1", "expert", 0),
    ("21b-a3b", "tpu7x:2x2x1", "expert", 512),
    ("21b-a3b", "v5e:16x16", None, 0),
    ("21b-a3b", "v5e:4x4", "exchange", 0),
    ("300b-a47b", "v5e:8x8", None, 0),
]


def compile_step(name, where, sharding, chunk):
    config = ModelConfig.from_file(f"configs/ernie-4.5-{name}.json")
    config = dataclasses.replace(config, num_nextn_predict_layers=0)
    topology = parse_topology(where)
    layout = make_layout(config, topology.compile_devices(), preset=sharding)
    group_pages = -(-BATCH // layout.groups) * CONTEXT // PAGE_SIZE + 1
    shape = prefill_shape(config, layout, chunk, CONTEXT) if chunk else decode_shape(config, layout, BATCH, CONTEXT)
    start = time.monotonic()
    program = compile_all({"step": lower_step(config, layout, jnp.bfloat16, shape, group_pages)})["step"]
    cache = group_pages * PAGE_SIZE * bytes_per_token(config, jnp.bfloat16) // layout.size("kv_head")
    print(
        f"{name} on {where}, {layout.describe()}, {chunk or 'decode'}: arguments {program.arguments / 1e9:.2f} GB, "
        f"cache {cache / 1e9:.2f} GB, temporaries {program.temporaries / 1e9:.3f} GB, {time.monotonic() - start:.0f} s"
    )
    return config, topology.chip, layout, shape, program, cache


@pytest.mark.parametrize("case", STEPS, ids=lambda case: "-".join(map(str, case)))
def test_a_step_fits_and_sends_what_it_must(case):
    config, chip, layout, shape, program, cache = compile_step(*case)
    assert program.arguments + program.temporaries < chip.device_memory
    # A copy of the cache would be a temporary of its size, or an output beside the donated argument.
    assert program.temporaries < max(cache, 400e6)
    sent = collections.Counter()
    for item in program.collectives:
        assert not item.open_loop
        sent[item.kind] += item.count
    layers, width = config.num_hidden_layers, config.hidden_size
    moe_layers = sum(config.is_moe_layer(i) for i in range(layers))
    if layout.preset == "exchange":
        # The embedding and the last hidden states; then for each exchange the choices, and the tokens there and back.
        assert sent == {"all-reduce": 2, "all-gather": moe_layers, "ragged-all-to-all": 2 * moe_layers}
    else:
        # The embedding, and two sums a layer in bfloat16 whatever the shape.
        assert sent == {"all-reduce": 2 * layers + 1}
        assert {item.bytes for item in program.collectives} == {2 * shape.tokens * width}


def test_the_greedy_sampler_gathers_no_logits():
    config = ModelConfig.from_file("configs/ernie-4.5-21b-a3b.json")
    layout = make_layout(config, parse_topology("v5e:2x4").compile_devices())
    program = compile_all({"sample": lower_sample(config, layout, jnp.bfloat16, BATCH)})["sample"]
    # The best value of each slice of the vocabulary, and its place.
    assert [(item.kind, item.count) for item in program.collectives] in ([("all-gather", 2)], [("all-gather", 1)] * 2)
    assert sum(item.bytes * item.count for item in program.collectives) <= BATCH * layout.size("vocab") * 8
