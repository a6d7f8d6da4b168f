"""Objectives: what a step adds up over its rows, what of that it minimises, and what it tells of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.model import Backends, Ernie
from ernie_jax.model.layers import Attend, Routing
from ernie_jax.sharding import Layout
from ernie_jax.train.data import Batch, PreferenceBatch
from ernie_jax.train.losses import IGNORED, summed_loss, token_losses
from ernie_jax.train.mtp import predictions, shifted_targets
from ernie_jax.train.preference import (
    Answers,
    PreferenceOptions,
    PreferenceSums,
    answers,
    interleaved,
    preference_objective,
    preference_sums,
    sides,
)
from ernie_jax.train.recipe import Recipe
from ernie_jax.train.router_losses import load_balance_loss, orthogonality_loss, z_loss

_MANY_LOGITS = 1 << 29  # where the head learns: its gradient is read and written for each chunk of logits
ROUTER_WEIGHT, ROUTER_BIAS = "layers.{}.mlp.router.weight", "layers.{}.mlp.router.correction_bias"


class Forward(NamedTuple):
    """One run of a model over rows, and what it takes to run more of it."""

    model: Ernie
    rows: Batch
    hidden: jax.Array  # [B, T, D]
    attend: Attend
    backends: Backends
    remember: Callable[[Callable], Callable]


class _Head:
    """The losses of tokens by a model's head: each device takes a part of the tokens and the head's whole weight."""

    def __init__(self, layout: Layout, learns: bool = False):
        self._layout = layout
        self._most_logits = [_MANY_LOGITS] if learns else []

    def total(self, model: Ernie, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        """Return the sum over all tokens."""
        return self._spread(lambda *part: summed_loss(*part, *self._most_logits)[None], model, hidden, targets).sum()

    def each(self, model: Ernie, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        """Return the loss of each token, [B, T]."""
        return self._spread(token_losses, model, hidden, targets)[: targets.size].reshape(targets.shape)

    def _spread(self, losses: Callable, model: Ernie, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        weight, bias = model.head_weights()
        hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        devices = self._layout.size("token")
        if devices == 1:
            return losses(hidden, weight, bias, targets)
        more = -len(targets) % devices
        hidden, targets = jnp.pad(hidden, ((0, more), (0, 0))), jnp.pad(targets, (0, more), constant_values=IGNORED)
        tokens, whole = self._layout.spec(("token",)), self._layout.spec(())
        spread = jax.shard_map(
            losses,
            mesh=self._layout.mesh,
            in_specs=(tokens, whole, whole, tokens),
            out_specs=tokens,
            check_vma=False,  # the gradient of its own that a chunk brings knows no such types
        )
        return spread(hidden, weight, bias, targets)


class NextToken:
    """Learn the next token, and with `mtp_weight` those after it."""

    class Sums(NamedTuple):
        """Losses summed over targets, or how many targets these were: of the next token, and of each depth [depths]."""

        loss: jax.Array
        depths: jax.Array

    def __init__(self, recipe: Recipe, config: ModelConfig, layout: Layout):
        head = "embed.weight" if config.tie_word_embeddings else "head.weight"
        self._head = _Head(layout, learns=not (recipe.lora or recipe.freezes(head)))
        self._mtp_weight, self._balanced = recipe.mtp_weight, recipe.token_balanced
        self._depths = range(1, config.num_nextn_predict_layers + 1) if recipe.mtp_weight else ()

    def rows(self, batch: Batch) -> Batch:
        """Return the rows that the model runs over."""
        return batch

    def sums(self, forward: Forward, batch: Batch) -> Sums:
        """Return what a batch, or a part of one, adds up to."""
        loss = self._head.total(forward.model, forward.hidden, batch.targets)
        ahead = []
        if self._depths:
            model, _, hidden, attend, backends, remember = forward
            found = predictions(model, hidden, batch.tokens, batch.positions, attend, backends, remember)
            for depth, states in zip(self._depths, found, strict=True):
                ahead.append(self._head.total(model, states, shifted_targets(batch.targets, batch.segments, depth)))
        return self.Sums(loss, jnp.array(ahead))

    def counts(self, batch: Batch) -> Sums:
        """Return how many targets a whole batch has."""
        ahead = [jnp.sum(shifted_targets(batch.targets, batch.segments, d) != IGNORED) for d in self._depths]
        return self.Sums(jnp.sum(batch.targets != IGNORED), jnp.array(ahead))

    def value(self, sums: Sums, counts: Sums, batch: Batch) -> jax.Array:
        """Return what is minimised; of parts, whose values add up, `counts` and `batch` are those of the whole step."""
        if self._balanced:
            counts = jax.tree.map(lambda count: jnp.full_like(count, batch.targets.size), counts)
        loss, depths = _means(sums, counts)
        return loss + self._mtp_weight * depths.mean() if self._depths else loss

    def metrics(self, sums: Sums, counts: Sums) -> dict[str, jax.Array]:
        """Return means."""
        loss, depths = _means(sums, counts)
        return {"loss": loss} | ({"mtp_loss": depths.mean()} if self._depths else {})


class Preference:
    """Learn which of two answers is the better one."""

    class Counts(NamedTuple):
        """How many pairs, and tokens of their chosen answers."""

        pairs: jax.Array
        tokens: jax.Array

    def __init__(self, options: PreferenceOptions, layout: Layout):
        self._head, self._options = _Head(layout), options

    def rows(self, batch: PreferenceBatch) -> Batch:
        """Return the rows that the model runs over."""
        return interleaved(batch.chosen, batch.rejected)

    def answers(self, forward: Forward, batch: PreferenceBatch) -> tuple[Answers, Answers]:
        """Return the chosen and the rejected answers by row and segment."""
        logprobs = -self._head.each(forward.model, forward.hidden, forward.rows.targets)
        return sides(answers(logprobs, forward.rows.targets, forward.rows.segments, batch.pairs.shape[1]))

    def sums(self, forward: Forward, batch: PreferenceBatch) -> PreferenceSums:
        """Return what a batch, or a part of one, adds up to."""
        chosen, rejected = self.answers(forward, batch)
        return preference_sums(self._options, chosen, rejected, batch.reference, batch.pairs >= 0)

    def counts(self, batch: PreferenceBatch) -> Counts:
        """Return how much a whole batch has."""
        return self.Counts(jnp.sum(batch.pairs >= 0), jnp.sum(batch.chosen.targets != IGNORED))

    def value(self, sums: PreferenceSums, counts: Counts, batch: PreferenceBatch) -> jax.Array:
        """Return what is minimised; of parts, whose values add up, `counts` are those of the whole step."""
        return preference_objective(self._options, sums, *counts)

    def metrics(self, sums: PreferenceSums, counts: Counts) -> dict[str, jax.Array]:
        """Return means over pairs, log-probabilities of whole answers."""
        pairs = jnp.maximum(counts.pairs, 1)
        chosen, rejected = sums.chosen_reward / pairs, sums.rejected_reward / pairs
        return {
            "loss": preference_objective(self._options, sums, *counts),
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "reward_margin": chosen - rejected,
            "reward_accuracy": sums.correct / pairs,
            "chosen_logprob": -sums.chosen_loss / pairs,
            "rejected_logprob": -sums.rejected_loss / pairs,
        }


def _means(sums: NextToken.Sums, counts: NextToken.Sums) -> NextToken.Sums:
    return jax.tree.map(lambda total, count: total / jnp.maximum(count, 1), sums, counts)


def make_objective(recipe: Recipe, config: ModelConfig, layout: Layout) -> NextToken | Preference:
    """Return what a recipe minimises beside the routers' losses."""
    if options := recipe.preference_options:
        return Preference(options, layout)
    return NextToken(recipe, config, layout)


class RouterLosses:
    """The losses of the routers that a recipe asks for, each the sum over the MoE layers."""

    def __init__(self, recipe: Recipe, config: ModelConfig):
        self._weights = {
            "router_balance": recipe.router_balance_weight,
            "router_z": recipe.router_z_weight,
            "router_orthogonality": recipe.router_orthogonality_weight,
        }
        self._shown = {name for name, weight in self._weights.items() if weight}
        if recipe.router_orthogonality_rate:
            self._shown.add("router_orthogonality")
        self._parts, self._k, self._layers = recipe.accumulate, config.moe_k, config.moe_layers

    def sums(self, model: Ernie, routing: tuple[Routing, ...], real: jax.Array) -> dict[str, jax.Array]:
        """Return a part's share of the step's losses, which are means over its parts."""
        routers = [model.layers[index].mlp.router.weight[...] for index in self._layers]
        losses = {
            "router_balance": lambda: sum(load_balance_loss(one.probabilities, self._k, real) for one in routing),
            "router_z": lambda: sum(z_loss(one.log_total, real) for one in routing),
            "router_orthogonality": lambda: sum(map(orthogonality_loss, routers)),
        }
        return {name: loss() / self._parts for name, loss in losses.items() if name in self._shown}

    def value(self, sums: dict[str, jax.Array]) -> jax.Array | float:
        """Return what is minimised of it."""
        return sum(weight * sums[name] for name, weight in self._weights.items() if weight)

    def metrics(self, sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Return means over the MoE layers."""
        return {name: total / len(self._layers) for name, total in sums.items()}


def check_objectives(recipe: Recipe, config: ModelConfig, trained: set[str]) -> None:
    """Check that a recipe asks of a model only what it has, and what is trained of it.

    Raises:
      UserError: naming the field that asks for more.
    """
    learns = any(ROUTER_WEIGHT.format(index) in trained for index in config.moe_layers)
    for name in ("balance_weight", "z_weight", "orthogonality_weight", "orthogonality_rate"):
        if not getattr(recipe, f"router_{name}"):
            continue
        if not config.moe_layers:
            raise UserError(f"recipe field router_{name}: {recipe.directory} has no routers; leave it at 0")
        if name.startswith("orthogonality") and not learns:
            raise UserError(
                f"recipe field router_{name} moves the routers' weights, which this run leaves as they are; leave it "
                "at 0, or train the weights themselves with a list frozen that has no routers"
            )
    if recipe.mtp_weight and not config.num_nextn_predict_layers:
        raise UserError(f"recipe field mtp_weight: {recipe.directory} has no multi-token prediction; leave it at 0")
