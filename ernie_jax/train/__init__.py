"""Training: a recipe, packed data, losses and the loop."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ernie_jax.train.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from ernie_jax.train.loop import run

__all__ = ["Recipe", "load_recipe", "run", "train"]


def __getattr__(name: str) -> Any:
    """Import the loop when it is first used: the processes that tokenise need no JAX."""
    if name != "run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ernie_jax.train.loop import run

    return run


def train(
    path: str | os.PathLike,
    overrides: Iterable[str] = (),
    progress: bool = True,
    mesh: str | None = None,
    sharding: str | None = None,
    tensorboard: bool = False,
) -> dict[str, dict[str, float]]:
    """Run the recipe in a TOML file with some fields overridden ("name=value"); see `run`."""
    from ernie_jax.train.loop import run

    return run(load_recipe(path, overrides), progress, mesh, sharding, tensorboard)
