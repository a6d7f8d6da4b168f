"""A training step at full width, compiled for an H100 that is not here: by our kernels, without copies of weights."""

import collections
import dataclasses
import math
import pathlib
import re

import jax
import jax.numpy as jnp

from ernie_jax.config import ModelConfig
from ernie_jax.sharding import make_layout, single
from ernie_jax.train.data import Batch
from ernie_jax.train.recipe import load_recipe
from ernie_jax.train.trainer import Trainer
from tests.hopper.conftest import h100s

RECIPE = pathlib.Path("benchmarks/train.toml")
LENGTH = 1024


def lower_step(*fields, layers=2, gpus=1, sharding=None):
    config = ModelConfig.from_file("configs/ernie-4.5-21b-a3b.json")
    config = dataclasses.replace(
        config, num_hidden_layers=layers, moe_layer_end_index=layers - 1, num_nextn_predict_layers=0
    )
    devices = h100s(gpus)
    layout = make_layout(config, devices, preset=sharding) if sharding else single(*devices)
    recipe = load_recipe(RECIPE, [f"sequence_length={LENGTH}", f"batch_size={gpus}", *fields])
    trainer = Trainer(recipe, config, layout)
    rows = jax.ShapeDtypeStruct((gpus, LENGTH), jnp.int32, sharding=layout.sharding(("group", None)))
    return trainer, trainer.step.lower(trainer.abstract_state(), Batch(*[rows] * 4))


def called(text):
    """Count the kernels of ours that a compiled program calls."""
    calls = [line for line in text.splitlines() if " custom-call(" in line]
    return collections.Counter(re.findall(r"jit\((attend|pull_\w+|grouped_\w+)\)/body", "\n".join(calls)))


ATTENTION = dict.fromkeys(("attend", "pull_queries", "pull_keys"), 2)  # of two layers


def test_a_step_is_our_kernels():
    trainer, lowered = lower_step("moment_dtype=bfloat16")
    assert trainer.backends.attention == "mosaic"
    compiled = lowered.compile()
    text = compiled.as_text()
    # Of an MoE layer and a dense one: experts' gate and up, down, both ways back, and what both learn. Nothing of all
    # this is computed again.
    assert called(text) == ATTENTION | {"grouped_product": 4, "grouped_outer_product": 2}
    # XLA multiplies nothing by stacked weights.
    assert not re.search(r" dot\(.*bf16\[64,", text)
    # The weights and their gradients in bfloat16, and somewhat more.
    weights = sum(leaf.size for leaf in trainer.plan.abstract.values())
    assert compiled.memory_analysis().temp_size_in_bytes < 1.3 * 2 * 2 * weights


def test_frozen_experts_have_no_gradient():
    _, lowered = lower_step("lora_rank=32", 'lora_targets=["attention"]')
    text = lowered.as_text()
    assert "@grouped_product" in text and "outer_product" not in text


def test_adapters_of_experts_expand_nothing():
    trainer, lowered = lower_step("lora_rank=32", 'lora_targets=["attention", "routed"]')
    compiled = lowered.compile()
    text = compiled.as_text()
    # To each of the four products comes one with the first part of its adapter. Each part's gradient is one, too.
    assert called(text) == ATTENTION | {"grouped_product": 8, "grouped_outer_product": 4}
    # XLA makes nothing of the size of stacked weights, neither a copy nor a gradient, and multiplies by no adapters'.
    stacked = r"= \w+\[64,(?:\d+,)*(?:3072,2560|1536,2560|2560,1536)\]\S* ([\w-]+)"
    assert set(re.findall(stacked, text)) == {"parameter", "bitcast"}
    assert not re.search(r" dot\(.*bf16\[64,", text)
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2 * 1536 * 2560 * 2


def test_adapters_of_experts_are_sharded_as_these():
    fields = "lora_rank=32", 'lora_targets=["routed"]'
    _, lowered = lower_step(*fields, gpus=8, sharding="expert+tensor")
    # Of 64 experts an expert's half each of 16, and of 1,536 their inner width 768; the rank is filled up.
    parts = set(re.findall(r"@grouped_outer_product\w*\(.*-> \(?tensor<(\S+)xbf16>", lowered.as_text()))
    assert parts == {"16x2560x64", "16x1536x64", "16x768x64"}


def test_weights_are_rounded_before_they_are_gathered():
    _, lowered = lower_step("moment_dtype=bfloat16", gpus=2, sharding="fsdp")
    gathers = re.findall(r"= (.*) all-gather(?:-start)?\(", lowered.compile().as_text())
    wide = [shape for line in gathers for shape in re.findall(r"f32\[([\d,]+)\]", line)]
    routers = 64 * 2560
    assert gathers and all(math.prod(map(int, shape.split(","))) <= routers for shape in wide)
