"""Trainer: the jitted steps of a recipe."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.model import Backends, Ernie
from ernie_jax.model.adapters import UP
from ernie_jax.ops import DIFFERENTIABLE_EXPERT_BACKENDS, packed_attention
from ernie_jax.sharding import Layout
from ernie_jax.train.data import Batch
from ernie_jax.train.losses import IGNORED, balanced_bias, expert_usage, routing_entropy, summed_loss
from ernie_jax.train.optimizer import make_optimizer, make_schedule
from ernie_jax.train.recipe import Recipe
from ernie_jax.train.weights import Parameters, Plan, Weights

_REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda layer: layer,
    "products": functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "layers": jax.checkpoint,
}


class TrainState(NamedTuple):
    """All that a step takes; it changes `parameters` and `optimizer`, which is what is saved.

    Attributes:
      parameters: float32 masters of what is trained.
      frozen: the other weights.
    """

    parameters: Parameters
    optimizer: optax.OptState
    frozen: Parameters


class Sums(NamedTuple):
    """What a batch, or a part of one, adds up to.

    Attributes:
      loss: summed over all targets, float32.
      usage: of the experts [E], by name of their layer's bias.
      entropy: of the routers' probabilities in nats, over all real tokens and MoE layers.
    """

    loss: jax.Array
    usage: dict[str, jax.Array]
    entropy: jax.Array


class Trainer:
    """The jitted steps of a recipe; XLA derives the communication from where a layout puts weights and batches.

    Attributes:
      config: of the model.
      plan: what of it is trained.
      schedule: step, counted from 0 -> learning rate.

    Raises:
      UserError: if the recipe names an unknown dtype or expert backend, or does not fit the model or layout.
    """

    def __init__(self, recipe: Recipe, config: ModelConfig, layout: Layout):
        if recipe.expert_backend not in DIFFERENTIABLE_EXPERT_BACKENDS:
            raise UserError(f"recipe field expert_backend must be one of {', '.join(DIFFERENTIABLE_EXPERT_BACKENDS)}")
        parts = layout.groups * recipe.accumulate
        if recipe.batch_size % parts:
            raise UserError(
                f"recipe field batch_size is {recipe.batch_size}: it must be a multiple of the {layout.groups} groups "
                f"of {layout.describe()} times accumulate, {recipe.accumulate}"
            )
        self.config, self._recipe, self._layout = config, recipe, layout
        self.plan = Plan(recipe, config, layout)
        self._biases = [f"layers.{i}.mlp.router.correction_bias" for i in config.moe_layers]
        self.schedule = make_schedule(recipe)
        ups = [name for name in self.plan.trained if name.endswith(UP)]
        self._optimizer = make_optimizer(recipe, self.schedule, dict.fromkeys(ups, recipe.lora_plus))
        self.step = jax.jit(self._step, donate_argnums=0)
        self.evaluate_batch = jax.jit(self._evaluate_batch)
        self._extend = jax.jit(self._extended, static_argnums=3)

    def initial_state(self) -> TrainState:
        """Read or draw the weights that the recipe starts from."""
        weights = self.plan.start()
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state().optimizer)
        optimizer = jax.jit(self._optimizer.init, out_shardings=shardings)(weights.trained)
        return TrainState(weights.trained, optimizer, weights.frozen)

    def abstract_state(self) -> TrainState:
        """Describe shapes, dtypes and shardings of `initial_state`, without any weight."""
        trained = {name: self.plan.abstract[name] for name in self.plan.trained}
        frozen = {name: leaf for name, leaf in self.plan.abstract.items() if name not in trained}

        def place(path, leaf):  # moments lie as the parameters that they are of
            names = (entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
            sharding = next((trained[name].sharding for name in names if name in trained), self._layout.sharding())
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        optimizer = jax.eval_shape(self._optimizer.init, trained)
        return TrainState(trained, jax.tree_util.tree_map_with_path(place, optimizer), frozen)

    def bind(self, state: TrainState) -> Ernie:
        """Return the model with the weights of a state, rounded to the recipe's dtype; router tensors stay float32."""
        return self.plan.bind(Weights(state.parameters, state.frozen))

    def place(self, batch: Batch) -> Batch:
        """Put the rows of a batch where the layout wants them."""
        return jax.tree.map(lambda rows: self._layout.put(rows, ("group", None)), batch)

    def evaluate(self, state: TrainState, batches: list[Batch]) -> float:
        """Return the mean loss over all targets of some batches, in nats."""
        sums = [self.evaluate_batch(state, self.place(batch)) for batch in batches]
        loss, count = (math.fsum(map(float, part)) for part in zip(*sums, strict=True))
        return loss / count

    def extend(self, state: TrainState, rows: np.ndarray, lengths: np.ndarray, vocab_size: int) -> jax.Array:
        """Fill rows [B, T], of which the first lengths [B] tokens are given, with the likeliest tokens."""
        more = -len(rows) % self._layout.groups
        filled = np.pad(rows, ((0, more), (0, 0))), np.pad(lengths, (0, more), constant_values=rows.shape[1])
        return self._extend(state, *map(self._layout.put, filled), vocab_size)[: len(rows)]

    def _extended(self, state: TrainState, rows: jax.Array, lengths: jax.Array, vocab_size: int) -> jax.Array:
        model = self.bind(state)
        positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
        one_document, every = jnp.zeros_like(rows), jnp.arange(len(rows))

        def attend(q, k, v, cache):
            return packed_attention(q, k, v, one_document), cache

        def step(added, rows):
            place = lengths + added
            backends = Backends(self._recipe.expert_backend)
            out = model(rows, positions, attend, backends=backends, shard=self._layout.whole())
            logits = model.logits(out.hidden[every, place - 1])[:, :vocab_size]
            return rows.at[every, place].set(logits.argmax(-1).astype(rows.dtype), mode="drop")

        return jax.lax.fori_loop(0, rows.shape[1] - lengths.min(), step, rows)

    def _sums(self, weights: Weights, batch: Batch) -> Sums:
        model = self.plan.bind(weights)

        def attend(q, k, v, cache):
            return packed_attention(q, k, v, batch.segments), cache

        backends, remember = Backends(self._recipe.expert_backend), _REMAT[self._recipe.remat]
        shard = self._layout.whole()
        out = model(batch.tokens, batch.positions, attend, backends=backends, shard=shard, remember=remember)
        real = batch.segments.reshape(-1) >= 0
        usages = [expert_usage(routing.experts, self.config.moe_num_experts, real) for routing in out.routing]
        entropy = sum((routing_entropy(routing.probabilities, real) for routing in out.routing), jnp.float32(0))
        loss = self._loss(model, out.hidden, batch.targets)
        return Sums(loss, dict(zip(self._biases, usages, strict=True)), entropy)

    def _loss(self, model: Ernie, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        """Return the sum over all tokens: each device takes a part of them and the head's whole weight."""
        weight, bias = model.head_weights()
        hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        devices = self._layout.size("token")
        if devices == 1:
            return summed_loss(hidden, weight, bias, targets)
        more = -len(targets) % devices
        hidden, targets = jnp.pad(hidden, ((0, more), (0, 0))), jnp.pad(targets, (0, more), constant_values=IGNORED)
        tokens, whole = self._layout.spec(("token",)), self._layout.spec(())
        spread = jax.shard_map(
            lambda *part: summed_loss(*part)[None],
            mesh=self._layout.mesh,
            in_specs=(tokens, whole, whole, tokens),
            out_specs=tokens,
            check_vma=False,  # the gradient of its own that a chunk brings knows no such types
        )
        return spread(hidden, weight, bias, targets).sum()

    def _gradients(self, state: TrainState, batch: Batch, count: jax.Array) -> tuple[Parameters, Sums]:
        """Return the gradient of the loss per `count`, and what the batch adds up to."""

        def part(parameters, batch):
            sums = self._sums(Weights(parameters, state.frozen), batch)
            return sums.loss / count, sums

        differentiate = jax.grad(part, has_aux=True)
        parts = self._recipe.accumulate
        if parts == 1:
            return differentiate(state.parameters, batch)

        def step(total, batch):
            return jax.tree.map(jnp.add, total, differentiate(state.parameters, batch)), None

        # Every group has rows in each part.
        batches = jax.tree.map(lambda rows: jnp.moveaxis(rows.reshape(-1, parts, rows.shape[1]), 1, 0), batch)
        first = jax.tree.map(lambda rows: rows[0], batches)
        shapes = jax.eval_shape(differentiate, state.parameters, first)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        gradients, sums = zeros
        total, _ = jax.lax.scan(step, (self._constrained(gradients), sums), batches)
        return total

    def _constrained(self, parameters: Parameters) -> Parameters:
        shardings = {name: self.plan.abstract[name].sharding for name in parameters}
        return jax.lax.with_sharding_constraint(parameters, shardings)

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        count = jnp.maximum(jnp.sum(batch.targets != IGNORED), 1)
        gradients, sums = self._gradients(state, batch, batch.targets.size if self._recipe.token_balanced else count)
        updates, optimizer = self._optimizer.update(gradients, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        for name, used in sums.usage.items():
            if name in parameters:
                parameters[name] = balanced_bias(parameters[name], used, self._recipe.bias_update_rate)
        parameters = self._constrained(parameters)
        drift = [jnp.abs(parameters[name] - parameters[name].mean()).max() for name in sums.usage if name in parameters]
        metrics = {"train_loss": sums.loss / count, "gradient_norm": optax.tree.norm(gradients)}
        if sums.usage:
            metrics |= self._routing_metrics(sums, jnp.sum(batch.segments >= 0))
        if drift:
            metrics["bias_drift"] = jnp.stack(drift).max()
        return TrainState(parameters, optimizer, state.frozen), metrics

    def _routing_metrics(self, sums: Sums, tokens: jax.Array) -> dict[str, jax.Array]:
        used = jnp.stack(list(sums.usage.values()))  # [layers, E]
        return {
            "expert_load": used,
            "busiest_expert": jnp.max(used / jnp.maximum(used.mean(axis=1, keepdims=True), 1e-9)),
            "dead_experts": jnp.sum(used == 0),
            "router_entropy": sums.entropy / jnp.maximum(tokens * len(used), 1),
        }

    def _evaluate_batch(self, state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        loss = self._sums(Weights(state.parameters, state.frozen), batch).loss
        return loss, jnp.sum(batch.targets != IGNORED)
