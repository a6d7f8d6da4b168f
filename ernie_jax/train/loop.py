"""A run: it trains by a recipe, saves as it goes, and goes on where it was interrupted."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from ernie_jax import adapter, checkpoint, distributed
from ernie_jax.config import read_json
from ernie_jax.errors import UserError
from ernie_jax.paths import storage_path
from ernie_jax.sharding import make_layout, single, whole
from ernie_jax.train.data import PreferenceData, TrainingData, batch_sides, claim_data, load_data
from ernie_jax.train.metrics import Metrics
from ernie_jax.train.recipe import Recipe
from ernie_jax.train.reference import Reference, needs_reference
from ernie_jax.train.samples import Samples
from ernie_jax.train.trainer import Trainer, TrainState
from ernie_jax.train.watch import Guard, Interrupts, Pace, describe
from ernie_jax.train.weights import read_config


def run(
    recipe: Recipe,
    progress: bool = True,
    mesh: str | None = None,
    sharding: str | None = None,
    tensorboard: bool = False,
) -> dict[str, dict[str, float]]:
    """Train, or go on where an interrupted run of the same recipe last saved, and write what was trained.

    Continuing is exact: data order depends on seed and step alone, so the weights come out bit-equal to those of a run
    without interruption wherever the device computes the same sums twice (a GPU needs
    XLA_FLAGS=--xla_gpu_deterministic_ops=true for that). SIGTERM and Ctrl-C save before they end the run; of several
    processes, which share a file system, it is enough that one is told.

    Args:
      progress: show a bar with loss, tokens a second and time left.
      mesh, sharding: as for `sharding.make_layout`, over all devices; default: one device. A run may go on in another
        layout, and then is equal within rounding.
      tensorboard: write metrics for TensorBoard, beside metrics.jsonl.

    Returns:
      source -> what is left of its held-out examples at the end: the mean loss and whatever else the objective tells.

    Raises:
      UserError: if inputs are missing or do not fit together, `output` holds another or a finished run, or a loss is
        not finite or jumps up.
      KeyboardInterrupt: after a signal to end, when the state is saved.
    """
    config = read_config(recipe)
    data = load_data(recipe, config)
    _check_kind(recipe, data.training)
    if distributed.process_count() > 1 and not (mesh or sharding):
        raise UserError("several processes train together over all their devices: say how, as with --sharding=fsdp")
    layout = make_layout(config, jax.devices(), mesh, sharding) if mesh or sharding else single()
    trainer = Trainer(recipe, config, layout)
    # Orbax takes no relative paths.
    output = storage_path(recipe.output)
    if distributed.is_primary():
        _claim(output, recipe)
    distributed.barrier("the output is claimed")

    with _Saves(output / "state", recipe) as saves, Interrupts() as interrupts:
        start = distributed.broadcast(saves.latest)
        claim_data(output, data.digests, start)
        metrics = Metrics(output, start, tensorboard) if distributed.is_primary() else None
        reference = Reference(recipe, output, data) if needs_reference(recipe) else None
        quiet = not (progress and distributed.is_primary())

        def meet(first: TrainState) -> None:
            if reference:
                reference.compute(trainer, first, interrupts, not quiet)

        state = saves.restore(trainer, start, meet)
        training, heldout = reference or data.training, reference.heldout() if reference else data.heldout
        samples = Samples(recipe, trainer, output, start) if recipe.sample_prompts else None
        guard = Guard(recipe.loss_spike, output, lambda step: training.batch(step - 1))
        sizes = {name: leaf.size for name, leaf in trainer.plan.abstract.items()}
        pace = Pace(config, layout, sizes, recipe.lora is not None, ahead=bool(recipe.mtp_weight))
        places = recipe.batch_size * recipe.sequence_length * (1 if recipe.preference is None else 2)
        if not quiet:
            tqdm.write(f"experts: {recipe.expert_backend}, attention: {trainer.backends.attention}", file=sys.stderr)
        began = time.perf_counter()
        with tqdm(total=recipe.steps, initial=start, desc="train", unit="step", disable=quiet) as bar:
            for step in range(start + 1, recipe.steps + 1):
                batch = training.batch(step - 1)
                state, values = trainer.step(state, trainer.place(batch))
                pace.count(*batch_sides(batch))
                guard.follow(step, values)
                last = step == recipe.steps
                evaluates = last or step % recipe.evaluate_every == 0
                if logs := evaluates or step % recipe.log_every == 0:
                    guard.settle()
                    row = {"step": step, "tokens": step * places, "seconds": time.perf_counter() - began}
                    row |= {"learning_rate": float(trainer.schedule(step - 1))}
                    row |= {name: float(value) for name, value in values.items() if not value.shape}
                    row |= pace.measure()
                    if evaluates:
                        for name, held in heldout.items():
                            row |= {f"{name}_{what}": value for what, value in trainer.evaluate(state, held).items()}
                        row |= {name: value.tolist() for name, value in values.items() if value.shape}
                    if metrics:
                        metrics.add(row)
                    bar.set_postfix_str(describe(row), refresh=False)
                if evaluates:
                    if metrics:
                        metrics.draw()
                    if samples:
                        for prompt, text in zip(recipe.sample_prompts, samples.write(step, state), strict=True):
                            bar.write(f"{prompt!r} -> {text!r}")
                bar.update()
                ends = any(distributed.gather(interrupts.heard))  # whichever process was told to
                if last or ends or step % recipe.save_every == 0:
                    guard.settle()
                    saves.save(step, state)
                    if ends and not last:
                        saves.finish()
                        distributed.barrier("all is saved")
                        bar.write(f"saved step {step}; the same command goes on from there")
                        raise KeyboardInterrupt
                if logs:
                    pace.restart()
        saves.finish()
    if metrics:
        metrics.finish()
    _write_result(output, recipe, trainer, state)
    return {name: trainer.evaluate(state, held) for name, held in heldout.items()}


def _check_kind(recipe: Recipe, training: TrainingData | PreferenceData) -> None:
    """Check that the sources hold what the recipe learns from."""
    pairs = isinstance(training, PreferenceData)
    if pairs and recipe.preference is None:
        raise UserError(
            "the sources hold pairs of answers, and the recipe has no field preference: give it that, or sources with "
            "one answer each"
        )
    if not pairs and recipe.preference is not None:
        raise UserError(
            "the recipe field preference is for pairs of answers, and the sources hold one answer each: leave it out, "
            "or give sources with pairs"
        )


class _Saves:
    """The states of a run on disk, written while it goes on; those that are no longer kept are deleted."""

    def __init__(self, directory: epath.Path, recipe: Recipe):
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(recipe.keep_last)]
        if recipe.keep_every:
            keep.append(policies.EveryNSteps(recipe.keep_every))
        self._checkpointer = ocp.training.Checkpointer(
            directory, preservation_policy=policies.AnyPreservationPolicy(keep), cleanup_tmp_directories=True
        )
        self._writing = None

    def __enter__(self) -> _Saves:
        return self

    def __exit__(self, *_) -> None:
        self._checkpointer.close()

    @property
    def latest(self) -> int:
        """The last step that was saved; 0 if there is none."""
        latest = self._checkpointer.latest
        return latest.step if latest else 0

    def restore(self, trainer: Trainer, step: int, meet: Callable[[TrainState], None]) -> TrainState:
        """Return the state after a step that was saved, after 0 the first one, which `meet` sees anyhow."""
        state = trainer.initial_state()
        meet(state)
        if not step:
            return state
        frozen, abstract = state.frozen, trainer.abstract_state()
        del state  # the weights that the run started from: there may be no room for both
        parameters, optimizer = self._checkpointer.load(step, (abstract.parameters, abstract.optimizer))
        return TrainState(parameters, optimizer, frozen)

    def save(self, step: int, state: TrainState) -> None:
        """Copy a state to the host and write it from there, in the background, once the one before it is written."""
        self.finish()
        self._writing = self._checkpointer.save_async(step, (state.parameters, state.optimizer))

    def finish(self) -> None:
        """Wait until the last state is written; raises what went wrong with it."""
        if self._writing:
            self._writing.result()
            self._writing = None


def _write_result(output: epath.Path, recipe: Recipe, trainer: Trainer, state: TrainState) -> None:
    """Write what was trained: the adapters, or the whole model as a checkpoint."""
    model = trainer.bind(state)
    if recipe.lora:
        manifest = checkpoint.read_manifest(recipe.checkpoint) if recipe.checkpoint else {}
        arrays = {name: whole(value) for name, value in state.parameters.items()}
        trained = adapter.Adapter(recipe.lora, adapter.identity(model, manifest), recipe.directory, arrays)
        if distributed.is_primary():
            adapter.save(output / "adapter", trained)
        return
    origin = f" from {recipe.checkpoint}" if recipe.checkpoint else ""
    source = f"trained by ernie_jax{origin}, seed {recipe.seed}"
    checkpoint.save(output / "checkpoint", model, checkpoint.read_small_files(recipe.directory), source)


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
