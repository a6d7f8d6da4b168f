"""The weights a run starts from: which of them it trains, and which stay as they are."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ernie_jax import checkpoint
from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.model import Ernie, initialize
from ernie_jax.model.adapters import DOWN, UP, declare, draw
from ernie_jax.paths import storage_path
from ernie_jax.sharding import Layout, shard_abstract
from ernie_jax.train.recipe import Recipe, check_directory

Parameters = dict[str, jax.Array]  # dotted path, as in model.parameter_specs


class Weights(NamedTuple):
    """All weights of a model: float32 masters of those that are trained, the others as the computation takes them."""

    trained: Parameters
    frozen: Parameters


class Plan:
    """What a recipe trains of a model.

    Attributes:
      graph, leaves: the abstract model in the recipe's dtype, as `nnx.split` and `nnx.to_flat_state` give it.
      abstract: dotted path -> shape, dtype and sharding of each weight, of trained ones of their masters.
      trained: names of those that are trained.

    Raises:
      UserError: if the recipe cannot train this model.
    """

    def __init__(self, recipe: Recipe, config: ModelConfig, layout: Layout):
        if config.quantize and not recipe.lora:
            raise UserError(
                f"{recipe.directory}: its weights are rounded to {config.quantize}; train adapters (lora_rank) or a "
                "checkpoint that is not"
            )
        self._recipe, self._config, self._layout = recipe, config, layout
        model = Ernie(config, self._dtype)
        if recipe.lora:
            declare(model, recipe.lora, self._dtype)
        self.graph, state = nnx.split(model)
        self.leaves = nnx.to_flat_state(state)
        placed = flat(shard_abstract(state, layout))
        # Where no objective reaches the weights of multi-token prediction, weight decay alone would move them.
        learns = _is_adapter if recipe.lora else lambda name: bool(recipe.mtp_weight) or not name.startswith("mtp.")
        self.trained = {name for name in placed if learns(name) and not recipe.freezes(name)}
        if not self.trained:
            raise UserError("recipe field frozen leaves no parameter to train")
        self.abstract = {
            name: leaf.update(dtype=jnp.float32) if name in self.trained else leaf for name, leaf in placed.items()
        }

    @property
    def _dtype(self) -> jnp.dtype:
        return checkpoint.parse_dtype(self._recipe.dtype)

    def start(self) -> Weights:
        """Read the recipe's checkpoint or draw random weights, straight into the shards of the layout."""
        recipe = self._recipe
        dtype = self._dtype if recipe.lora else jnp.dtype(jnp.float32)
        if recipe.checkpoint:
            model = checkpoint.restore(recipe.checkpoint, self._layout, dtype)
        else:
            model = Ernie(self._config, dtype)
            initialize(model, self._layout, recipe.seed, recipe.init_scale)
        weights = flat(nnx.state(model))
        adapters = filter(_is_adapter, self.abstract)
        weights |= {name: draw(name, self.abstract[name], recipe.seed) for name in adapters}
        trained = {name: weights.pop(name) for name in self.trained}
        return Weights(trained, {name: weight.astype(self.abstract[name].dtype) for name, weight in weights.items()})

    def bind(self, weights: Weights) -> Ernie:
        """Return the model with these weights, rounded to the recipe's dtype; router tensors stay float32."""
        everything = weights.trained | weights.frozen
        if self._recipe.lora:
            ups = (name for name in everything if name.endswith(UP))
            everything |= {name: everything[name] * self._recipe.lora.scale for name in ups}

        def rounded(path, leaf):
            name = ".".join(map(str, path))
            weight = everything[name].astype(leaf.get_value().dtype)
            if self._layout.mesh.size > 1:  # else XLA may gather float32 and round it there: twice as many bytes
                weight = jax.lax.with_sharding_constraint(weight, self.abstract[name].sharding)
            return path, leaf.replace(weight)

        return nnx.merge(self.graph, nnx.from_flat_state([rounded(path, leaf) for path, leaf in self.leaves]))


def _is_adapter(name: str) -> bool:
    return name.endswith((DOWN, UP))


def flat(state: nnx.State) -> dict:
    """Map the dotted path of each parameter to its value."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def read_config(recipe: Recipe) -> ModelConfig:
    """Read the config of the recipe's model.

    Raises:
      UserError: if there is none, or its positions are fewer than a row has.
    """
    check_directory(recipe)
    if recipe.checkpoint:
        config = checkpoint.read_config(recipe.checkpoint)
    else:
        config = ModelConfig.from_file(storage_path(recipe.model) / "config.json")
    check_length(recipe, config)
    return config


def check_length(recipe: Recipe, config: ModelConfig) -> None:
    """Check that a row has no more positions than the model.

    Raises:
      UserError: if it has.
    """
    if recipe.sequence_length > config.max_position_embeddings:
        raise UserError(
            f"recipe field sequence_length is {recipe.sequence_length}: the model's max_position_embeddings is "
            f"{config.max_position_embeddings}"
        )
