"""train."""

from __future__ import annotations

import math

from absl import flags

from ernie_jax.cli import hosts, models
from ernie_jax.cli.command import Command, require


def _define(values: flags.FlagValues) -> None:
    models.define_recipe_flags(values)
    models.define_layout_flags(values, "one device")
    flags.DEFINE_bool("tensorboard", False, "write metrics for TensorBoard, beside metrics.jsonl", flag_values=values)
    hosts.define_flags(values)


def _train(values: flags.FlagValues) -> None:
    require(values, "config")
    hosts.join(values)
    from ernie_jax.train import train

    layout = {"mesh": values.mesh, "sharding": values.sharding}
    heldout = train(values.config, values["set"].value, tensorboard=values.tensorboard, **layout)
    for source, found in heldout.items():
        if "reward_margin" in found:
            print(
                f"held-out pairs of {source}: {found['reward_accuracy']:.1%} have the greater reward for the chosen "
                f"answer, by {found['reward_margin']:.3f} on average"
            )
        else:
            print(f"held-out perplexity of {source}: {math.exp(found['loss']):.3f}")


TRAIN = Command(
    "train",
    "Train a model, or adapters for one, by a recipe. Saves as it goes, and when SIGTERM or Ctrl-C ends it; the same "
    "command resumes an interrupted run exactly where it saved. docs/training.md tells more.",
    (
        "main.py train --config=configs/train_embedded.toml",
        "main.py train --config=configs/train_embedded.toml --set=steps=100 --set=output=out/short",
        "main.py train --config=configs/sft_lora_1gpu.toml --set=learning_rate=2e-4 --set=sources.chat.times=2",
        "main.py train --config=configs/sft_full.toml --sharding=fsdp",
        "main.py train --config=configs/dpo_lora.toml --set=preference.beta=0.2",
        "main.py train --config=configs/sft_full.toml --sharding=fsdp --coordinator=HOST:1234 --num_processes=2 "
        "--process_id=0",
    ),
    _define,
    _train,
)
