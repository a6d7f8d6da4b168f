"""plan."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys

from absl import flags

from ernie_jax.cli import models
from ernie_jax.cli.command import Command, require
from ernie_jax.config import ModelConfig

_CONTEXT = 8192


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "model",
        None,
        f"a preset ({', '.join(models.presets())}), a checkpoint or Hugging Face directory, or a hub id; weights are "
        "not read",
        flag_values=values,
    )
    flags.DEFINE_string("revision", None, "branch, tag or commit of a hub id", flag_values=values)
    flags.DEFINE_string(
        "topology",
        None,
        "a TPU slice as v5e:2x4, tpu7x:2x2x1 or in the cloud's words v5e-8, v5p-64; or a host's GPUs as h100:8; with "
        "--train also a TPU's name alone: its smallest slice that fits",
        flag_values=values,
    )
    flags.DEFINE_string("sharding", None, "a preset; default: the best", flag_values=values)
    flags.DEFINE_string("mesh", None, "mesh sizes, as expert:8 or data:2,expert:4", flag_values=values)
    flags.DEFINE_integer("batch", 16, "sequences decoded at the same time", flag_values=values)
    flags.DEFINE_integer(
        "context", None, f"tokens of each sequence ({_CONTEXT} or the model's most)", flag_values=values
    )
    flags.DEFINE_integer("prefill_chunk", None, "prompt tokens of a step (the engine's)", flag_values=values)
    flags.DEFINE_string("dtype", None, "of weights and cache; default: the model's", flag_values=values)
    models.define_kv_dtype(values)
    flags.DEFINE_string("quantize", None, "int8, fp8 or int4: as if converted so", flag_values=values)
    models.define_quantize_embedding(values)
    flags.DEFINE_bool("compare", False, "table all shardings", flag_values=values)
    flags.DEFINE_bool("json", False, "print one JSON object", flag_values=values)
    flags.DEFINE_bool("train", False, "plan a training step, of the recipe in --config", flag_values=values)
    models.define_recipe_flags(values)


def _plan(values: flags.FlagValues) -> None:
    if values.train:
        _plan_training(values)
    else:
        _plan_generation(values)


def _plan_training(values: flags.FlagValues) -> None:
    require(values, "config", "topology")
    os.environ["JAX_PLATFORMS"] = "cpu"  # as below
    from ernie_jax.chips import CHIPS
    from ernie_jax.planner import report
    from ernie_jax.planner.topology import parse_topology
    from ernie_jax.planner.training import plan_training, smallest_slice
    from ernie_jax.train import load_recipe
    from ernie_jax.train.weights import check_length, read_config

    recipe = load_recipe(values.config, values["set"].value)
    if values.model:
        config, _, _ = models.read_model(values.model, values.revision)
        check_length(recipe, config)
    else:
        config = read_config(recipe)
    config = _quantized(config, values)
    announce = functools.partial(print, file=sys.stderr)
    chip = CHIPS.get(values.topology)
    plan = None
    if chip is None:
        topology = parse_topology(values.topology)
        chip = topology.chip
        plan = plan_training(recipe, config, topology, values.sharding, values.mesh, announce)
    searched = plan is None or not plan.fits
    found = smallest_slice(recipe, config, chip, values.sharding, announce) if searched else None
    model = values.model or recipe.directory
    if values.json:
        named = (("plan", plan), ("smallest" if found and found.fits else "largest", found))
        print(json.dumps({name: report.training_object(model, one) for name, one in named if one}))
        return
    if plan:
        print(report.describe_training(model, plan))
    if searched:
        what = "the smallest slice of {} that it fits"
        if not (found and found.fits):
            way = f"cut by {values.sharding}" if values.sharding else "cut by fsdp (--sharding names another way)"
            what = f"{way} it fits no slice of {{}} that its batch_size fills"
            what += "; the largest of them:" if found else ""
        print(f"\n{what.format(chip.title)}\n")
    if found:
        print(report.describe_training(model, found))


def _quantized(config: ModelConfig, values: flags.FlagValues) -> ModelConfig:
    return dataclasses.replace(
        config,
        quantize=values.quantize or config.quantize,
        quantize_embedding=values.quantize_embedding or config.quantize_embedding,
    )


def _plan_generation(values: flags.FlagValues) -> None:
    require(values, "model", "topology")
    os.environ["JAX_PLATFORMS"] = "cpu"  # read when JAX starts: leave this machine's accelerators alone
    from ernie_jax.checkpoint import parse_dtype
    from ernie_jax.engine.cache import parse_kv_dtype
    from ernie_jax.engine.options import default_prefill_chunk
    from ernie_jax.planner import report
    from ernie_jax.planner.plan import Plan, Request, estimate_all, make_plan, measure, suggest
    from ernie_jax.planner.topology import parse_topology

    topology = parse_topology(values.topology)
    config, stored, _ = models.read_model(values.model, values.revision)
    config = _quantized(config, values)
    request = Request(
        config,
        topology,
        parse_dtype(values.dtype or stored),
        values.batch,
        min(_CONTEXT, config.max_position_embeddings) if values.context is None else values.context,
        default_prefill_chunk(topology.chip.platform) if values.prefill_chunk is None else values.prefill_chunk,
        parse_kv_dtype(values.kv_dtype, parse_dtype(values.dtype or stored)),
    )
    announce = functools.partial(print, file=sys.stderr)
    plan = make_plan(request, values.sharding, values.mesh, announce=announce)
    advice = [] if plan.fits else list(suggest(plan))
    others: dict[str, Plan | str] = {}
    if values.compare:
        for name, other in estimate_all(request).items():
            if isinstance(other, Plan):
                other = plan if other.layout == plan.layout else measure(other, announce)
            others[name] = other
    if values.json:
        found = report.to_object(values.model, plan, advice)
        if values.compare:
            found["compare"] = {
                name: report.to_object(values.model, other, []) if isinstance(other, Plan) else {"problem": other}
                for name, other in others.items()
            }
        print(json.dumps(found))
        return
    print(report.describe(values.model, plan, advice))
    if values.compare:
        print("\n" + report.compare(others, plan.layout.preset))


PLAN = Command(
    "plan",
    "Say whether a model fits a TPU slice or a host's GPUs: compile its steps ahead of time for the slice (no TPU is "
    "needed, only libtpu), show each chip's memory, the collectives, and the least time a step can take.",
    (
        "main.py plan --model=ernie-4.5-21b-a3b --topology=v5e-8 --context=32768 --batch=16",
        "main.py plan --model=checkpoints/21b --topology=v6e:2x4 --sharding=expert+tensor --json",
        "main.py plan --model=ernie-4.5-21b-a3b --topology=h100:2 --compare",
        "main.py plan --model=ernie-4.5-21b-a3b --topology=v6e-1 --quantize=int8 --kv_dtype=int8",
        "main.py plan --train --config=configs/sft_full.toml --model=ernie-4.5-21b-a3b --topology=v5p",
    ),
    _define,
    _plan,
)
