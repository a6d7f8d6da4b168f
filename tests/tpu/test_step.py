"""Models of full width, compiled for TPU slices: whole ones fit; all send what they should, and have the kernels."""

import collections
import dataclasses
import functools
import re

import jax.numpy as jnp
import pytest

from ernie_jax.config import ModelConfig
from ernie_jax.engine.aot import decode_shape, lower_sample, lower_step, prefill_shape
from ernie_jax.engine.cache import PAGE_SIZE, bytes_per_token
from ernie_jax.planner.hlo import collectives
from ernie_jax.planner.topology import parse_topology
from ernie_jax.sharding import make_layout, single

pytest.importorskip("libtpu", reason="libtpu, of the test extra, is for Linux on x86-64 only")

BATCH = 64
KERNEL = 'custom_call_target="tpu_custom_call"'
# (model, slice, sharding, prompt tokens of the step or 0 for decoding, layers or None for all). Of 21B's, v5e:2x4 has
# least memory: tests/cli/test_plan.py compiles all layers for it, and what fits there fits the others. Two layers, a
# dense one and one with experts, show the rest.
STEPS = [
    ("21b-a3b", "v5e:2x4", "expert", 0, 2),
    ("21b-a3b", "v5e:2x4", "expert", 512, 2),
    ("21b-a3b", "v5e:4x4", "expert", 0, 2),
    ("21b-a3b", "v5p:2x2x2", "expert", 0, 2),
    ("21b-a3b", "v5p:2x2x2", "expert", 512, 2),
    ("21b-a3b", "v6e:2x4", "expert", 0, 2),
    ("21b-a3b", "v6e:2x4", "expert", 512, 2),
    ("21b-a3b", "tpu7x:2x2x1", "expert", 0, 2),
    ("21b-a3b", "tpu7x:2x2x1", "expert", 512, 2),
    ("21b-a3b", "v5e:16x16", None, 0, 2),
    ("21b-a3b", "v5e:4x4", "exchange", 0, 4),
    ("300b-a47b", "v5e:8x8", None, 0, None),
]


def read_config(name, layers=None):
    config = ModelConfig.from_file(f"configs/ernie-4.5-{name}.json")
    config = dataclasses.replace(config, num_nextn_predict_layers=0)
    if layers is not None:
        config = dataclasses.replace(config, num_hidden_layers=layers, moe_layer_end_index=layers - 1)
    return config


def count(text):
    sent = collections.Counter()
    for item in collectives(text):
        assert not item.open_loop
        sent[item.kind] += item.count
    return sent


@pytest.mark.parametrize("case", STEPS, ids=lambda case: "-".join(map(str, case)))
def test_a_step_fits_and_sends_what_it_must(case):
    name, where, sharding, chunk, layers = case
    config, topology = read_config(name, layers), parse_topology(where)
    layout = make_layout(config, topology.compile_devices(), preset=sharding)
    context = 8192 if chunk else 2048
    shape = (prefill_shape if chunk else decode_shape)(config, layout, chunk or BATCH, context)
    group_pages = -(-BATCH // layout.groups) * 2048 // PAGE_SIZE + 1
    compiled = lower_step(config, layout, jnp.bfloat16, shape, group_pages).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    cache = group_pages * PAGE_SIZE * bytes_per_token(config, jnp.bfloat16) // layout.size("kv_head")
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    used += memory.output_size_in_bytes - memory.alias_size_in_bytes
    print(f"{layout.describe()}: {used / 1e9:.2f} GB, of which temporaries {memory.temp_size_in_bytes / 1e9:.3f} GB")
    assert used < topology.chip.device_memory
    # Of the cache nothing is copied: it goes out where it came in, and no temporary has its size.
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < (cache if topology.chips < 64 else 100e6)

    layers, moe_layers = config.num_hidden_layers, sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
    # One attention kernel a layer; the grouped product twice a layer with experts, for more tokens than a few hundred.
    assert text.count(KERNEL) == layers + (2 * moe_layers if chunk else 0)
    if layout.preset == "exchange":
        # The embedding and the last hidden states; then for each exchange the choices, and the tokens there and back.
        assert count(text) == {"all-reduce": 2, "all-gather": moe_layers, "ragged-all-to-all": 2 * moe_layers}
        # Behind the last layer the choices of all are counted, which the compiler likes as much for that time.
        assert while_travelling(text, "combine")[:-1] == [True] * (moe_layers - 1)
    else:
        # The embedding, and two sums a layer in bfloat16 whatever the shape.
        assert count(text) == {"all-reduce": 2 * layers + 1}
        assert {item.bytes for item in collectives(text)} == {2 * shape.tokens * config.hidden_size}


@functools.cache
def quantized(form, where, layers, tokens, cached=65536, context=8192, kv_dtype=None, embedding=False):
    """Compile a step of the 21B model, cut to some layers, on one chip; `tokens` of one prompt if more than 64."""
    config = dataclasses.replace(read_config("21b-a3b", layers), quantize=form, quantize_embedding=embedding)
    layout = make_layout(config, parse_topology(where).compile_devices())
    shape = (decode_shape if tokens <= 64 else prefill_shape)(config, layout, tokens, context, kv_dtype=kv_dtype)
    lowered = lower_step(config, layout, jnp.bfloat16, shape, cached // PAGE_SIZE + 1, kv_dtype=kv_dtype)
    return lowered.compile().memory_analysis()


# Written out in bfloat16, the smallest weight of a layer has 13 MB, the largest 1 GB, the embedding 0.5 GB.
@pytest.mark.parametrize(
    ("form", "where", "tokens", "most"),
    [
        ("fp8", "v5e:1x1", 8, 10e6),
        ("int4", "v5e:1x1", 1, 10e6),
        ("int4", "v5e:1x1", 512, 1.6e9),
    ],
)
def test_quantised_weights_are_not_written_out(form, where, tokens, most):
    temporaries = quantized(form, where, 2, tokens, embedding=True).temp_size_in_bytes
    print(f"temporaries {temporaries / 1e6:.1f} MB")
    assert temporaries < most


@pytest.mark.parametrize(
    ("tokens", "cached"),
    [(8, {}), (1, {"cached": 131072, "context": 131072, "kv_dtype": jnp.float8_e4m3fn})],
    ids=["65536", "131072-fp8"],
)
def test_int4_21b_fits_a_v5e_chip(tokens, cached):
    """With so many cached tokens, decoding some sequences; of a prefill step two layers tell what is left for."""
    memory = quantized("int4", "v5e:1x1", 28, tokens, **cached)
    assert memory.temp_size_in_bytes < 60e6  # nothing is written out here either
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    used += memory.output_size_in_bytes - memory.alias_size_in_bytes
    free = parse_topology("v5e:1x1").chip.device_memory - used
    prefill = quantized("int4", "v5e:1x1", 2, 512, **cached).temp_size_in_bytes
    print(f"{used / 2**30:.2f} GiB used, {free / 2**30:.2f} free, of which prefill takes {prefill / 2**30:.2f} more")
    assert free > 1.25 * prefill


@pytest.mark.parametrize("kv_dtype", [jnp.int8, jnp.float8_e4m3fn], ids=["int8", "fp8"])
@pytest.mark.parametrize("tokens", [1, 512], ids=["decode", "prefill"])
def test_an_8_bit_cache_of_the_longest_context(tokens, kv_dtype):
    """On one chip, of the layers only the first: pages stay where they are, and fp8 has the kernel."""
    config = dataclasses.replace(read_config("21b-a3b"), num_hidden_layers=1)
    layout = single(parse_topology("v5e:2x4").compile_devices()[0])
    shape_of, context = prefill_shape if tokens > 1 else decode_shape, config.max_position_embeddings
    shape = shape_of(config, layout, tokens, context, kv_dtype=kv_dtype)
    pages = context // PAGE_SIZE + 1
    compiled = lower_step(config, layout, jnp.bfloat16, shape, pages, kv_dtype=kv_dtype).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory.alias_size_in_bytes >= pages * PAGE_SIZE * bytes_per_token(config, kv_dtype)
    assert memory.temp_size_in_bytes < pages * PAGE_SIZE * bytes_per_token(config, kv_dtype)
    whole = f"[{pages},{PAGE_SIZE},8,128]"
    assert not [line for line in text.splitlines() if " copy(" in line and whole in line.split("(")[0]]
    assert text.count(KERNEL) == (kv_dtype == jnp.float8_e4m3fn)


def while_travelling(text, way):
    """Tell for each exchange of one way whether the shared experts' products are scheduled while rows travel."""
    found, computing = [], None
    for line in text[text.index("\nENTRY") :].splitlines():
        if f"/{way}/ragged_all_to_all" in line and re.search(r" ragged-all-to-all-(start|done)\(", line):
            if computing is not None:
                found.append(computing)
            computing = None if computing is not None else False
        elif computing is not None and "/shared/" in line and re.search(r" (fusion|convolution|dot)\(", line):
            computing = True
    return found


def test_the_greedy_sampler_gathers_no_logits():
    config = read_config("21b-a3b")
    layout = make_layout(config, parse_topology("v5e:2x4").compile_devices())
    text = lower_sample(config, layout, jnp.bfloat16, BATCH).compile().as_text()
    # The best value of each slice of the vocabulary, and its place.
    assert count(text) == {"all-gather": 2}
    assert sum(item.bytes * item.count for item in collectives(text)) <= BATCH * layout.size("vocab") * 8
