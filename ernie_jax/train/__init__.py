"""Training: a recipe, packed data, losses and the loop."""

from __future__ import annotations

import os
from collections.abc import Iterable

from ernie_jax.train.loop import run
from ernie_jax.train.recipe import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe", "run", "train"]


def train(
    path: str | os.PathLike,
    overrides: Iterable[str] = (),
    progress: bool = True,
    mesh: str | None = None,
    sharding: str | None = None,
) -> dict[str, float]:
    """Run the recipe in a TOML file with some fields overridden ("name=value"); see `run`."""
    return run(load_recipe(path, overrides), progress, mesh, sharding)
