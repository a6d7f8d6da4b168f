"""A run: it trains by a recipe, saves as it goes, and goes on where it was interrupted."""

from __future__ import annotations

import dataclasses
import json
import math
import time

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from ernie_jax import adapter, checkpoint
from ernie_jax.config import ModelConfig, read_json
from ernie_jax.errors import UserError
from ernie_jax.paths import storage_path
from ernie_jax.sharding import make_layout, single
from ernie_jax.train.data import Batch, TrainingData, heldout_batches, read_documents
from ernie_jax.train.metrics import Metrics
from ernie_jax.train.recipe import Recipe
from ernie_jax.train.trainer import Trainer, TrainState
from ernie_jax.train.weights import read_config


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
    config = read_config(recipe)
    training, heldout = _read_data(recipe, config)
    layout = make_layout(config, jax.devices(), mesh, sharding) if mesh or sharding else single()
    trainer = Trainer(recipe, config, layout)
    # Orbax takes no relative paths.
    output = storage_path(recipe.output)
    _claim(output, recipe)

    policies = ocp.training.preservation_policies
    with ocp.training.Checkpointer(output / "state", preservation_policy=policies.LatestN(1)) as saved:
        start = saved.latest.step if saved.latest else 0
        state = trainer.initial_state()
        if start:
            frozen, abstract = state.frozen, trainer.abstract_state()
            del state  # the weights that the run started from
            parameters, optimizer = saved.load(start, (abstract.parameters, abstract.optimizer))
            state = abstract._replace(parameters=parameters, optimizer=optimizer, frozen=frozen)
        heldout_columns = [f"{name}_loss" for name in heldout]
        columns = ["step", "tokens", "seconds", "learning_rate", "train_loss", *heldout_columns]
        more = ["gradient_norm", "busiest_expert", "dead_experts", "router_entropy"]
        metrics = Metrics(output, [*columns, *more], start)
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
                    saved.save(step, (state.parameters, state.optimizer))
    _write_result(output, recipe, trainer, state)
    return {name: math.exp(trainer.evaluate(state, batches)) for name, batches in heldout.items()}


def _write_result(output: epath.Path, recipe: Recipe, trainer: Trainer, state: TrainState) -> None:
    """Write what was trained: the adapters, or the whole model as a checkpoint."""
    model = trainer.bind(state)
    if recipe.lora:
        manifest = checkpoint.read_manifest(recipe.checkpoint) if recipe.checkpoint else {}
        arrays = {name: np.asarray(value) for name, value in state.parameters.items()}
        trained = adapter.Adapter(recipe.lora, adapter.identity(model, manifest), recipe.directory, arrays)
        adapter.save(output / "adapter", trained)
        return
    origin = f" from {recipe.checkpoint}" if recipe.checkpoint else ""
    source = f"trained by ernie_jax{origin}, seed {recipe.seed}"
    checkpoint.save(output / "checkpoint", model, checkpoint.read_small_files(recipe.directory), source)


def _read_data(recipe: Recipe, config: ModelConfig) -> tuple[TrainingData, dict[str, list[Batch]]]:
    """Return the training batches, and the held-out batches of each source."""
    directory = storage_path(recipe.data)
    shape = recipe.batch_size, recipe.sequence_length
    paths = [directory / f"{name}.train.npy" for name, times in recipe.sources.items() for _ in range(times)]
    documents = read_documents(paths, config.eos_token_id, config.vocab_size)
    heldout = {}
    for name in recipe.sources:
        path = directory / f"{name}.heldout.npy"
        heldout[name] = heldout_batches(read_documents([path], config.eos_token_id, config.vocab_size), *shape)
    return TrainingData(documents, *shape, recipe.seed), heldout


def _claim(output: epath.Path, recipe: Recipe) -> None:
    """Write down whose output this is, or check that it is this recipe's and not finished."""
    if checkpoint.is_checkpoint(output / "checkpoint") or adapter.is_adapter(output / "adapter"):
        raise UserError(f"{output}: this run is finished; choose another output or delete it")
    file, fields = output / "recipe.json", json.loads(json.dumps(dataclasses.asdict(recipe)))
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
