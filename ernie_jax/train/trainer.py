"""Trainer: from random weights to a checkpoint, resumable at every save."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from etils import epath
from flax import nnx
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from ernie_jax import checkpoint
from ernie_jax.config import ModelConfig, read_json
from ernie_jax.errors import UserError
from ernie_jax.model import Backends, Ernie, initialize
from ernie_jax.ops import DIFFERENTIABLE_EXPERT_BACKENDS, packed_attention
from ernie_jax.paths import storage_path
from ernie_jax.sharding import Layout, make_layout, shard_abstract, single
from ernie_jax.train.data import Batch, claim_data, load_data
from ernie_jax.train.losses import balanced_bias, cross_entropy, expert_usage
from ernie_jax.train.metrics import Metrics
from ernie_jax.train.recipe import Recipe

Parameters = dict[str, jax.Array]  # dotted path, as in model.parameter_specs -> float32 master weight


class TrainState(NamedTuple):
    """All that a step changes."""

    parameters: Parameters
    optimizer: optax.OptState


class Trainer:
    """The jitted steps of a recipe; XLA derives the communication from where a layout puts weights and batches.

    Raises:
      UserError: if the recipe names an unknown dtype or expert backend.
    """

    def __init__(self, recipe: Recipe, config: ModelConfig, layout: Layout):
        if recipe.expert_backend not in DIFFERENTIABLE_EXPERT_BACKENDS:
            raise UserError(f"recipe field expert_backend must be one of {', '.join(DIFFERENTIABLE_EXPERT_BACKENDS)}")
        if recipe.batch_size % layout.groups:
            raise UserError(
                f"recipe field batch_size is {recipe.batch_size}: it must be a multiple of the {layout.groups} groups "
                f"of {layout.describe()}"
            )
        self._recipe, self._config, self._layout = recipe, config, layout
        abstract = Ernie(config, checkpoint.parse_dtype(recipe.dtype))
        self._graph, state = nnx.split(abstract)
        self._leaves = nnx.to_flat_state(state)
        placed = nnx.to_flat_state(shard_abstract(state, layout))
        self._shardings = {".".join(map(str, path)): leaf.get_value().sharding for path, leaf in placed}
        moe_layers = [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]
        self._biases = [f"layers.{i}.mlp.router.correction_bias" for i in moe_layers]
        self.schedule = optax.warmup_cosine_decay_schedule(
            0.0, recipe.learning_rate, recipe.warmup_steps, recipe.steps, recipe.final_learning_rate
        )
        self._optimizer = optax.chain(
            optax.clip_by_global_norm(recipe.gradient_clip),
            optax.adamw(
                self.schedule,
                recipe.adam_beta1,
                recipe.adam_beta2,
                recipe.adam_epsilon,
                weight_decay=recipe.weight_decay,
                mask=lambda parameters: {name: _decays(name) for name in parameters},
            ),
        )
        self.step = jax.jit(self._step, donate_argnums=0)
        self.evaluate_batch = jax.jit(self._evaluate_batch)

    def initial_state(self) -> TrainState:
        """Draw the weights that the recipe's seed gives."""
        model = Ernie(self._config, jnp.float32)
        initialize(model, self._layout, self._recipe.seed, self._recipe.init_scale)
        leaves = nnx.to_flat_state(nnx.state(model))
        parameters = {".".join(map(str, path)): leaf.get_value() for path, leaf in leaves}
        return TrainState(parameters, self._optimizer.init(parameters))

    def bind(self, parameters: Parameters) -> Ernie:
        """Return the model with these weights, rounded to the recipe's dtype; router tensors stay float32."""

        def rounded(path, leaf):
            return path, leaf.replace(parameters[".".join(map(str, path))].astype(leaf.get_value().dtype))

        return nnx.merge(self._graph, nnx.from_flat_state([rounded(path, leaf) for path, leaf in self._leaves]))

    def place(self, batch: Batch) -> Batch:
        """Put the rows of a batch where the layout wants them."""
        return jax.tree.map(lambda rows: self._layout.put(rows, ("group", None)), batch)

    def evaluate(self, state: TrainState, batches: list[Batch]) -> float:
        """Return the mean loss over all targets of some batches, in nats."""
        sums = [self.evaluate_batch(state.parameters, self.place(batch)) for batch in batches]
        loss, count = (math.fsum(map(float, part)) for part in zip(*sums, strict=True))
        return loss / count

    def _loss(self, parameters: Parameters, batch: Batch):
        """Return the summed loss, and (number of targets, usage of the experts [E] by name of their bias)."""
        model = self.bind(parameters)

        def attend(q, k, v, cache):
            return packed_attention(q, k, v, batch.segments), cache

        out = model(batch.tokens, batch.positions, attend, backends=Backends(self._recipe.expert_backend))
        real = batch.segments.reshape(-1) >= 0
        usages = [expert_usage(routing.experts, self._config.moe_num_experts, real) for routing in out.routing]
        loss, count = cross_entropy(model.logits(out.hidden), batch.targets)
        return loss, (count, dict(zip(self._biases, usages, strict=True)))

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        def mean_loss(parameters):
            loss, (count, usage) = self._loss(parameters, batch)
            return loss / count, usage

        (loss, usage), gradients = jax.value_and_grad(mean_loss, has_aux=True)(state.parameters)
        updates, optimizer = self._optimizer.update(gradients, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        for name, used in usage.items():
            parameters[name] = balanced_bias(parameters[name], used, self._recipe.bias_update_rate)
        parameters = jax.lax.with_sharding_constraint(parameters, self._shardings)
        metrics = {"train_loss": loss, "gradient_norm": optax.tree.norm(gradients)}
        if usage:
            used = jnp.stack(list(usage.values()))
            metrics["busiest_expert"] = jnp.max(used / used.mean(axis=1, keepdims=True))
        return TrainState(parameters, optimizer), metrics

    def _evaluate_batch(self, parameters: Parameters, batch: Batch) -> tuple[jax.Array, jax.Array]:
        loss, (count, _) = self._loss(parameters, batch)
        return loss, count


def run(
    recipe: Recipe, progress: bool = True, mesh: str | None = None, sharding: str | None = None
) -> dict[str, float]:
    """Train, or go on where an interrupted run of the same recipe last saved, and write the checkpoint.

    Continuing is exact: data order depends on seed and step alone, so the weights come out bit-equal to those of a run
    without interruption wherever the device computes the same sums twice (a GPU needs
    XLA_FLAGS=--xla_gpu_deterministic_ops=true for that).

    Args:
      progress: show a bar with loss, tokens a second and time left.
      mesh, sharding: as for `sharding.make_layout`, over all devices; default: one device.

    Returns:
      source -> perplexity of its held-out documents.

    Raises:
      UserError: if inputs are missing or do not fit together, or `output` holds another or a finished run.
    """
    source = storage_path(recipe.model)
    config = ModelConfig.from_file(source / "config.json")
    if recipe.sequence_length > config.max_position_embeddings:
        raise UserError(
            f"recipe field sequence_length is {recipe.sequence_length}: the model's max_position_embeddings is "
            f"{config.max_position_embeddings}"
        )
    training, heldout, digests = load_data(recipe, config)
    layout = make_layout(config, jax.devices(), mesh, sharding) if mesh or sharding else single()
    trainer = Trainer(recipe, config, layout)
    # Orbax takes no relative paths.
    output = storage_path(recipe.output)
    _claim(output, recipe)

    state = trainer.initial_state()
    policies = ocp.training.preservation_policies
    with ocp.training.Checkpointer(output / "state", preservation_policy=policies.LatestN(1)) as saved:
        start = saved.latest.step if saved.latest else 0
        claim_data(output, digests, start)
        if start:
            state = saved.load(start, jax.tree.map(ocp.arrays.to_shape_dtype_struct, state))
        heldout_columns = [f"{name}_loss" for name in heldout]
        columns = ["step", "tokens", "seconds", "learning_rate", "train_loss", *heldout_columns]
        metrics = Metrics(output, [*columns, "gradient_norm", "busiest_expert"], start)
        per_step = recipe.batch_size * recipe.sequence_length
        began = logged = time.perf_counter()
        logged_step = start
        with tqdm(total=recipe.steps, initial=start, desc="train", unit="step", disable=not progress) as bar:
            for step in range(start + 1, recipe.steps + 1):
                state, values = trainer.step(state, trainer.place(training.batch(step - 1)))
                evaluates = step % recipe.evaluate_every == 0
                if evaluates or step % recipe.log_every == 0 or step == recipe.steps:
                    row = {name: float(value) for name, value in values.items()}
                    now = time.perf_counter()
                    rate = (step - logged_step) * per_step / (now - logged)
                    if not math.isfinite(row["train_loss"]):
                        raise UserError(
                            f"the loss is {row['train_loss']} at step {step}; make learning_rate smaller and choose "
                            "another output"
                        )
                    if evaluates:
                        losses = [trainer.evaluate(state, batches) for batches in heldout.values()]
                        row |= dict(zip(heldout_columns, losses, strict=True))
                    row |= {"step": step, "tokens": step * per_step, "seconds": now - began}
                    metrics.add(row | {"learning_rate": float(trainer.schedule(step - 1))})
                    bar.set_postfix_str(f"loss {row['train_loss']:.3f}, {rate:,.0f} tokens/s", refresh=False)
                    logged, logged_step = time.perf_counter(), step
                bar.update()
                if step % recipe.save_every == 0 or step == recipe.steps:
                    saved.save(step, state)
    model = trainer.bind(state.parameters)
    files = {name: (source / name).read_bytes() for name in checkpoint.SMALL_FILES if (source / name).exists()}
    checkpoint.save(output / "checkpoint", model, files, source=f"trained by ernie_jax, seed {recipe.seed}")
    return {name: math.exp(trainer.evaluate(state, batches)) for name, batches in heldout.items()}


def _decays(name: str) -> bool:
    """Tell whether weight decay pulls a parameter: matrices yes, norms and biases no."""
    return name.endswith(".weight") and "norm" not in name


def _claim(output: epath.Path, recipe: Recipe) -> None:
    """Write down whose output this is, or check that it is this recipe's and not finished."""
    if checkpoint.is_checkpoint(output / "checkpoint"):
        raise UserError(f"{output}: this run is finished; choose another output or delete it")
    file, fields = output / "recipe.json", dataclasses.asdict(recipe)
    if file.exists():
        stored = read_json(file)
        if changed := [name for name in fields if stored.get(name) != fields[name]]:
            raise UserError(
                f"{output}: holds a run with other values of {', '.join(changed)}; choose another output or delete it"
            )
    if (output / "checkpoint").exists():  # interrupted while it was written
        (output / "checkpoint").rmtree()
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(fields, indent=2) + "\n")
