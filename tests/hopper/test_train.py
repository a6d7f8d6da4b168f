"""A training step at full width, compiled for an H100 that is not here: by our kernels, without copies of weights."""

import collections
import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp

from ernie_jax.config import ModelConfig
from ernie_jax.sharding import single
from ernie_jax.train.data import Batch
from ernie_jax.train.recipe import load_recipe
from ernie_jax.train.trainer import Trainer
from tests.hopper.conftest import h100s

RECIPE = pathlib.Path("benchmarks/train.toml")
LENGTH = 1024


def lower_step(*fields, layers=2):
    config = ModelConfig.from_file("configs/ernie-4.5-21b-a3b.json")
    config = dataclasses.replace(
        config, num_hidden_layers=layers, moe_layer_end_index=layers - 1, num_nextn_predict_layers=0
    )
    layout = single(*h100s(1))
    trainer = Trainer(load_recipe(RECIPE, [f"sequence_length={LENGTH}", *fields]), config, layout)
    rows = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32, sharding=layout.sharding(("group", None)))
    return trainer, trainer.step.lower(trainer.abstract_state(), Batch(*[rows] * 4))


def test_a_step_is_our_kernels():
    trainer, lowered = lower_step("moment_dtype=bfloat16")
    assert trainer.backends.attention == "mosaic"
    compiled = lowered.compile()
    text = compiled.as_text()
    calls = [line for line in text.splitlines() if " custom-call(" in line]
    called = collections.Counter(re.findall(r"jit\((attend|pull_\w+|grouped_\w+)\)/body", "\n".join(calls)))
    # Of an MoE layer and a dense one: experts' gate and up, down, both ways back, and what both learn. Nothing of all
    # this is computed again.
    attention = dict.fromkeys(("attend", "pull_queries", "pull_keys"), 2)
    assert called == attention | {"grouped_product": 4, "grouped_outer_product": 2}
    # XLA multiplies nothing by stacked weights.
    assert not re.search(r" dot\(.*bf16\[64,", text)
    # The weights and their gradients in bfloat16, and somewhat more.
    weights = sum(leaf.size for leaf in trainer.plan.abstract.values())
    assert compiled.memory_analysis().temp_size_in_bytes < 1.3 * 2 * 2 * weights


def test_frozen_experts_have_no_gradient():
    _, lowered = lower_step("lora_rank=32", 'lora_targets=["attention"]')
    text = lowered.as_text()
    assert "@grouped_product" in text and "outer_product" not in text
