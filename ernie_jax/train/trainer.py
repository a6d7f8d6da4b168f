"""Trainer: the jitted steps of a recipe."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.kernels import compiling_for
from ernie_jax.model import Ernie
from ernie_jax.model.adapters import UP
from ernie_jax.model.layers import Routing
from ernie_jax.ops import packed_attention
from ernie_jax.sharding import Layout
from ernie_jax.train.backends import REMAT, StepBackends
from ernie_jax.train.data import Batch, PreferenceBatch
from ernie_jax.train.losses import balanced_bias, expert_usage, routing_entropy
from ernie_jax.train.objectives import (
    ROUTER_BIAS,
    ROUTER_WEIGHT,
    Forward,
    RouterLosses,
    check_objectives,
    make_objective,
)
from ernie_jax.train.optimizer import make_optimizer, make_schedule
from ernie_jax.train.recipe import Recipe
from ernie_jax.train.router_losses import orthogonalized
from ernie_jax.train.weights import Parameters, Plan, Weights


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
      objective: the sums of the recipe's objective.
      routers: the routers' losses, by name.
      usage: of the experts [E], by name of their layer's bias.
      entropy: of the routers' probabilities in nats, over all real tokens and MoE layers.
    """

    objective: NamedTuple
    routers: dict[str, jax.Array]
    usage: dict[str, jax.Array]
    entropy: jax.Array


class Trainer:
    """The jitted steps of a recipe; XLA derives the communication from where a layout puts weights and batches.

    Attributes:
      config: of the model.
      plan: what of it is trained.
      schedule: step, counted from 0 -> learning rate.
      backends: what computes a step.

    Raises:
      UserError: if the recipe names an unknown dtype or backend, or does not fit the model, layout or device.
    """

    def __init__(self, recipe: Recipe, config: ModelConfig, layout: Layout):
        parts = layout.groups * recipe.accumulate
        if recipe.batch_size % parts:
            raise UserError(
                f"recipe field batch_size is {recipe.batch_size}: it must be a multiple of the {layout.groups} groups "
                f"of {layout.describe()} times accumulate, {recipe.accumulate}"
            )
        self.config, self._recipe, self._layout = config, recipe, layout
        self.backends = StepBackends(recipe, config, layout)
        self.plan = Plan(recipe, config, layout)
        check_objectives(recipe, config, self.plan.trained)
        self._objective, self._routers = make_objective(recipe, config, layout), RouterLosses(recipe, config)
        self.schedule = make_schedule(recipe)
        ups = [name for name in self.plan.trained if name.endswith(UP)]
        self._optimizer = make_optimizer(recipe, self.schedule, dict.fromkeys(ups, recipe.lora_plus))
        self.step = jax.jit(self._for_device(self._step), donate_argnums=0)
        self.evaluate_batch = jax.jit(self._for_device(self._evaluate_batch))
        self.logprobs = jax.jit(self._for_device(self._logprobs), out_shardings=layout.sharding())
        self._extend = jax.jit(self._for_device(self._extended), static_argnums=3)

    def _for_device(self, function: Callable) -> Callable:
        """Let kernels that a function is traced to be those of the layout's GPUs, which need not be here."""

        @functools.wraps(function)
        def traced(*args):
            with compiling_for(self._layout.capability):
                return function(*args)

        return traced

    def initial_state(self) -> TrainState:
        """Read or draw the weights that the recipe starts from."""
        weights = self.plan.start()
        optimizer = jax.jit(self._optimizer.init, out_shardings=self._optimizer_shardings())(weights.trained)
        return TrainState(weights.trained, optimizer, weights.frozen)

    def abstract_state(self) -> TrainState:
        """Describe shapes, dtypes and shardings of `initial_state`, without any weight."""
        trained = {name: self.plan.abstract[name] for name in self.plan.trained}
        frozen = {name: leaf for name, leaf in self.plan.abstract.items() if name not in trained}

        def place(path, leaf):  # moments lie as the parameters that they are of
            names = (entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
            of = next((trained[name] for name in names if name in trained), None)
            sharding = self._layout.sharding() if of is None else of.sharding
            if of is not None and leaf.shape != of.shape:  # one for each row
                sharding = sharding.update(spec=jax.P(*sharding.spec[: leaf.ndim - 1]))
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        optimizer = jax.eval_shape(self._optimizer.init, trained)
        return TrainState(trained, jax.tree_util.tree_map_with_path(place, optimizer), frozen)

    def lower(self, held: int) -> jax.stages.Lowered:
        """Lower a step from shapes alone, beside which each device holds so many MiB; it need not be here."""
        count, length = self._recipe.batch_size, self._recipe.sequence_length

        def rows(length, dtype=jnp.int32):
            return jax.ShapeDtypeStruct((count, length), dtype, sharding=self._layout.sharding(("group", None)))

        batch = Batch(*(rows(length) for _ in Batch._fields))
        if options := self._recipe.preference_options:
            known = (rows(1, jnp.float32),) * 2 if options.needs_reference else None
            batch = PreferenceBatch(batch, batch, rows(1), known)  # one pair a row
        place = self._layout.sharding(("token", None, None))
        more = jax.ShapeDtypeStruct((self._layout.mesh.size, held, 1 << 20), jnp.int8, sharding=place)
        step = jax.jit(lambda state, batch, _: self._step(state, batch), donate_argnums=0, keep_unused=True)
        return step.lower(self.abstract_state(), batch, more)

    def _optimizer_shardings(self) -> optax.OptState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state().optimizer)

    def bind(self, state: TrainState) -> Ernie:
        """Return the model with the weights of a state, rounded to the recipe's dtype; router tensors stay float32."""
        return self.plan.bind(Weights(state.parameters, state.frozen))

    def place(self, batch: Batch | PreferenceBatch) -> Batch | PreferenceBatch:
        """Put the rows of a batch where the layout wants them."""
        return jax.tree.map(lambda rows: self._layout.put(rows, ("group", None)), batch)

    def evaluate(self, state: TrainState, batches: list[Batch] | list[PreferenceBatch]) -> dict[str, float]:
        """Return the means over all of some batches, by name: the loss in nats, and what else the objective tells."""
        found = [jax.device_get(self.evaluate_batch(state, self.place(batch))) for batch in batches]
        total = jax.tree.map(lambda *parts: np.sum(np.asarray(parts, np.float64), axis=0), *found)
        return {name: float(value) for name, value in self._objective.metrics(*total).items()}

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
            out = model(rows, positions, attend, backends=self.backends.others, shard=self._layout.whole())
            logits = model.logits(out.hidden[every, place - 1])[:, :vocab_size]
            return rows.at[every, place].set(logits.argmax(-1).astype(rows.dtype), mode="drop")

        return self._everywhere(jax.lax.fori_loop(0, rows.shape[1] - lengths.min(), step, rows))

    def _forward(self, weights: Weights, batch: Batch | PreferenceBatch) -> tuple[Forward, tuple[Routing, ...]]:
        model, rows = self.plan.bind(weights), self._objective.rows(batch)
        attend, backends = self.backends.attend(rows.segments), self.backends.others
        remember, shard = REMAT[self._recipe.remat], self._layout.whole()
        out = model(rows.tokens, rows.positions, attend, backends=backends, shard=shard, remember=remember)
        return Forward(model, rows, out.hidden, attend, backends, remember), out.routing

    def _sums(self, weights: Weights, batch: Batch | PreferenceBatch) -> Sums:
        forward, routing = self._forward(weights, batch)
        real = forward.rows.segments.reshape(-1) >= 0
        usages = [expert_usage(one.experts, self.config.moe_num_experts, real) for one in routing]
        biases = map(ROUTER_BIAS.format, self.config.moe_layers)
        return Sums(
            self._objective.sums(forward, batch),
            self._routers.sums(forward.model, routing, real),
            dict(zip(biases, usages, strict=True)),
            sum((routing_entropy(one.probabilities, real) for one in routing), jnp.float32(0)),
        )

    def _logprobs(self, state: TrainState, batch: PreferenceBatch) -> tuple[jax.Array, jax.Array]:
        """Return those of the chosen and of the rejected answers, [B, S] each."""
        forward, _ = self._forward(Weights(state.parameters, state.frozen), batch)
        chosen, rejected = self._objective.answers(forward, batch)
        return chosen.logprobs, rejected.logprobs

    def _gradients(
        self, state: TrainState, batch: Batch | PreferenceBatch, counts: NamedTuple
    ) -> tuple[Parameters, Sums]:
        """Return the gradient of what is minimised, and what the batch adds up to."""

        def part(parameters, rows):
            sums = self._sums(Weights(parameters, state.frozen), rows)
            return self._objective.value(sums.objective, counts, batch) + self._routers.value(sums.routers), sums

        differentiate = jax.grad(part, has_aux=True)
        parts = self._recipe.accumulate
        if parts == 1:
            return differentiate(state.parameters, batch)

        def step(total, rows):
            return jax.tree.map(jnp.add, total, differentiate(state.parameters, rows)), None

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

    def _everywhere(self, values):
        """Have values on every device, so that every process can read them."""
        return jax.lax.with_sharding_constraint(values, self._layout.sharding())

    def _step(self, state: TrainState, batch: Batch | PreferenceBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        counts = self._objective.counts(batch)
        gradients, sums = self._gradients(state, batch, counts)
        updates, optimizer = self._optimizer.update(gradients, state.optimizer, state.parameters)
        optimizer = jax.lax.with_sharding_constraint(optimizer, self._optimizer_shardings())
        parameters = optax.apply_updates(state.parameters, updates)
        for name, used in sums.usage.items():
            if name in parameters:
                parameters[name] = balanced_bias(parameters[name], used, self._recipe.bias_update_rate)
        if rate := self._recipe.router_orthogonality_rate:
            for name in map(ROUTER_WEIGHT.format, self.config.moe_layers):
                if name in parameters:
                    parameters[name] = orthogonalized(parameters[name], rate)
        parameters = self._constrained(parameters)
        drift = [jnp.abs(parameters[name] - parameters[name].mean()).max() for name in sums.usage if name in parameters]
        metrics = {f"train_{name}": value for name, value in self._objective.metrics(sums.objective, counts).items()}
        metrics |= {"gradient_norm": optax.tree.norm(gradients)} | self._routers.metrics(sums.routers)
        if sums.usage:
            metrics |= self._routing_metrics(sums, jnp.sum(self._objective.rows(batch).segments >= 0))
        if drift:
            metrics["bias_drift"] = jnp.stack(drift).max()
        return TrainState(parameters, optimizer, state.frozen), self._everywhere(metrics)

    def _routing_metrics(self, sums: Sums, tokens: jax.Array) -> dict[str, jax.Array]:
        used = jnp.stack(list(sums.usage.values()))  # [layers, E]
        return {
            "expert_load": used,
            "busiest_expert": jnp.max(used / jnp.maximum(used.mean(axis=1, keepdims=True), 1e-9)),
            "dead_experts": jnp.sum(used == 0),
            "router_entropy": sums.entropy / jnp.maximum(tokens * len(used), 1),
        }

    def _evaluate_batch(self, state: TrainState, batch: Batch | PreferenceBatch) -> tuple[NamedTuple, NamedTuple]:
        sums = self._sums(Weights(state.parameters, state.frozen), batch)
        return self._everywhere((sums.objective, self._objective.counts(batch)))
