"""merge."""

from __future__ import annotations

from absl import flags

from ernie_jax.cli import hosts
from ernie_jax.cli.command import Command, require
from ernie_jax.distributed import say


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("model", None, "the converted checkpoint that the adapter was trained on", flag_values=values)
    flags.DEFINE_string("adapter", None, "the adapter: a run's adapter/ folder", flag_values=values)
    flags.DEFINE_string("target", None, "directory of the new checkpoint (local or gs://)", flag_values=values)


def _merge(values: flags.FlagValues) -> None:
    require(values, "model", "adapter", "target")
    hosts.refuse_several("merge")
    from ernie_jax.adapter import merge_checkpoint

    merge_checkpoint(values.model, values.adapter, values.target)
    say(f"wrote {values.target}")


MERGE = Command(
    "merge",
    "Add an adapter to the weights that it was trained on. What comes out is a checkpoint like any other, to be "
    "served, trained further or exported to Hugging Face's format.",
    ("main.py merge --model=checkpoints/21b --adapter=out/tuned/adapter --target=checkpoints/21b-tuned",),
    _define,
    _merge,
)
