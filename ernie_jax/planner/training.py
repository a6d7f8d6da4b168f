"""Plan a recipe's training step for a TPU slice: whether it fits, the smallest slice that does, and its roofline.

What is compiled are two programs with few layers and one part of a step, so that there is no loop whose inner work the
compiler might move out while it is small. Beside them the device holds what the other layers would have there: given
more room, the compiler would use it. Each further layer is taken to send what the second program does more than the
first, and each further part to repeat it. Weights, moments and operations are counted for the whole model.
"""

from __future__ import annotations

import dataclasses
import math

from ernie_jax.checkpoint import parse_dtype
from ernie_jax.chips import Chip
from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.planner import costs
from ernie_jax.planner.compilation import TooLarge, compile_all
from ernie_jax.planner.costs import Roofline
from ernie_jax.planner.plan import Announce
from ernie_jax.planner.topology import Topology, slice_shapes
from ernie_jax.sharding import Layout, make_layout, shard_bytes
from ernie_jax.train.recipe import Recipe
from ernie_jax.train.trainer import Trainer
from ernie_jax.train.watch import operations


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """A recipe on a slice; bytes and seconds are those of a device.

    Attributes:
      state: bytes of what lies there between steps: what learns, its moments, and frozen weights.
      temporaries: bytes of what a step needs beyond; None where the state and its gradients alone are too much.
      depths: layers of the programs that were compiled.
      flops: operations of a step, those included that are done again.
      model_flops: without them.
      moved: bytes to and from the memory: weights, gradients, moments.
      roofline: None where nothing was compiled.
      seconds: that compiling took.
      problem: why a program could not be compiled.
    """

    recipe: Recipe
    config: ModelConfig
    topology: Topology
    layout: Layout
    state: int
    temporaries: int | None = None
    depths: tuple[int, ...] = ()
    flops: float = 0.0
    model_flops: float = 0.0
    moved: float = 0.0
    roofline: Roofline | None = None
    seconds: float = 0.0
    problem: str | None = None

    @property
    def memory(self) -> int:
        """What a program can use."""
        return int(self.topology.chip.device_memory)

    @property
    def left(self) -> int:
        """Bytes that stay free; less than 0 where it does not fit."""
        return self.memory - self.state - (self.temporaries or 0)

    @property
    def fits(self) -> bool:
        return self.roofline is not None and self.left >= 0

    @property
    def tokens(self) -> int:
        """Tokens of a step, of all devices."""
        return _rows(self.recipe) * self.recipe.sequence_length


def plan_training(
    recipe: Recipe, config: ModelConfig, topology: Topology, sharding: str | None, mesh: str | None, announce: Announce
) -> TrainingPlan:
    """Plan a recipe as it is on a slice.

    Args:
      sharding, mesh: as for `sharding.make_layout`; default: fsdp, or one device where there is only one.

    Raises:
      UserError: if the slice is no TPU's, or the recipe or sharding suits neither it nor the model.
    """
    _check(topology.chip)
    return _measure(recipe, config, topology, _layout(config, topology, sharding, mesh), announce)


def smallest_slice(
    recipe: Recipe, config: ModelConfig, chip: Chip, sharding: str | None, announce: Announce
) -> TrainingPlan | None:
    """Plan a recipe on the smallest slice that it fits, with a row of each group in each part.

    Returns:
      if it fits none, the plan of the largest that its rows fill, which says what is missing; None: they fill none.

    Raises:
      UserError: if the chip is no TPU.
    """
    _check(chip)
    tried, found = set(), None
    for shape in slice_shapes(chip):
        topology = Topology(chip, shape)
        if topology.devices in tried:
            continue
        tried.add(topology.devices)
        try:
            layout = _layout(config, topology, sharding, None)
        except UserError:  # the model can't be cut into so many
            continue
        if layout.groups > recipe.batch_size:
            break
        if recipe.batch_size % layout.groups:
            continue
        adapted = dataclasses.replace(recipe, accumulate=recipe.batch_size // layout.groups)
        if (found := _measure(adapted, config, topology, layout, announce)).fits:
            break
    return found


def _rows(recipe: Recipe) -> int:
    """Return the rows of a step: of pairs, those of both answers."""
    return recipe.batch_size * (1 if recipe.preference is None else 2)


def _check(chip: Chip) -> None:
    if chip.platform != "tpu":
        raise UserError(f"plan --train compiles for TPU slices, and {chip.title} is none: try `main.py train` on it")


def _layout(config: ModelConfig, topology: Topology, sharding: str | None, mesh: str | None) -> Layout:
    if sharding is None and mesh is None:
        sharding = "single" if topology.devices == 1 else "fsdp"
    return make_layout(config, topology.compile_devices(), mesh, sharding)


def _measure(
    recipe: Recipe, config: ModelConfig, topology: Topology, layout: Layout, announce: Announce
) -> TrainingPlan:
    """Compile, unless it is plain that there is no room."""
    trainer = Trainer(recipe, config, layout)
    state = trainer.abstract_state()
    gradients = shard_bytes(state.parameters)
    plan = TrainingPlan(recipe, config, topology, layout, shard_bytes(state))
    sums = gradients if recipe.accumulate > 1 else 0  # of all parts, beside those of one
    if plan.left < gradients + sums:
        return plan
    depths = _depths(config)
    layers = " and ".join(map(str, depths))
    announce(f"compiling {layers} layers for {topology.name}, sharding {layout.describe()}: some minutes")
    part = dataclasses.replace(recipe, batch_size=recipe.batch_size // recipe.accumulate, accumulate=1)
    kept = part.batch_size // layout.groups * recipe.sequence_length * config.hidden_size  # what goes between layers
    kept *= parse_dtype(recipe.dtype).itemsize
    lowered = {}
    for depth in depths:
        one = Trainer(part, _cut(config, depth), layout)
        less = one.abstract_state()
        missing = plan.state - shard_bytes(less) + gradients - shard_bytes(less.parameters)
        held = missing + sums + kept * (config.num_hidden_layers - depth)
        lowered[f"{depth} layers"] = one.lower(held >> 20)
    try:
        programs = compile_all(lowered)
    except TooLarge as error:
        return dataclasses.replace(plan, depths=depths, problem=str(error))
    needed = [program.arguments + program.temporaries for program in programs.values()]
    sent = [costs.link_bytes(program.collectives, topology) for program in programs.values()]
    # Where more is kept of a layer than what goes into it, the second program needs that more than the first.
    total = needed[-1] if recipe.remat == "layers" else max(needed[-1], _at(config, depths, needed))
    forward, model_flops = _operations(recipe, config, trainer)
    flops = (model_flops + (forward if recipe.remat == "layers" else 0)) / topology.devices
    moved = _moved(recipe, config, layout, trainer, gradients)
    links, chip = recipe.accumulate * _at(config, depths, sent), topology.chip
    return dataclasses.replace(
        plan,
        temporaries=int(total) - plan.state,
        depths=depths,
        flops=flops,
        model_flops=model_flops / topology.devices,
        moved=moved,
        roofline=Roofline(
            moved / chip.device_bandwidth,
            flops / chip.device_flops,
            links / topology.link_bandwidth if links else 0.0,
            links,
        ),
        seconds=max(program.seconds for program in programs.values()),  # side by side
    )


def _depths(config: ModelConfig) -> tuple[int, ...]:
    """Return how many layers to compile: of one alone the compiler gathers the weights but once."""
    every = config.moe_layer_interval if config.is_moe else 1
    if config.num_hidden_layers <= 3 * every:
        return (config.num_hidden_layers,)
    return 2 * every, 3 * every


def _cut(config: ModelConfig, depth: int) -> ModelConfig:
    """Return a model of so many layers, all of which could be among the experts' of the whole one."""
    if depth == config.num_hidden_layers:
        return config
    return dataclasses.replace(config, num_hidden_layers=depth, moe_layer_start_index=0, moe_layer_end_index=depth - 1)


def _at(config: ModelConfig, depths: tuple[int, ...], found: list[float]) -> float:
    """Continue what was found at two depths to all layers."""
    if len(depths) == 1:
        return found[0]
    slope = (found[1] - found[0]) / (depths[1] - depths[0])
    return max(0.0, found[1] + slope * (config.num_hidden_layers - depths[1]))


def _operations(recipe: Recipe, config: ModelConfig, trainer: Trainer) -> tuple[float, float]:
    """Return the operations of a step's forward pass, and of all of it, each row being one document."""
    sizes = {name: math.prod(leaf.shape) for name, leaf in trainer.plan.abstract.items()}
    rows, length, ahead = _rows(recipe), recipe.sequence_length, bool(recipe.mtp_weight)
    seen = rows * length * (length + 1) // 2
    forward, backward = operations(config, sizes, recipe.lora is not None, ahead, rows * length, seen)
    return forward, forward + backward


def _moved(recipe: Recipe, config: ModelConfig, layout: Layout, trainer: Trainer, gradients: int) -> float:
    """Return the bytes that a device cannot avoid to move, without activations.

    Each part of a step reads the weights that a device multiplies by, gathered ones whole, for its forward pass, again
    if that is done again, and for the gradient; parts add up their gradients. The optimiser reads and writes what
    learns and its moments, and reads gradients.
    """
    shards = {axis: layout.size(axis) for axis in layout.table} | {"embed": 1}
    used = sum(
        math.prod(leaf.shape) // math.prod(shards[axis] for axis in leaf.axes if axis) * leaf.itemsize
        for leaf in costs.leaves(config, parse_dtype(recipe.dtype))
        if recipe.mtp_weight or not leaf.name.startswith("mtp.")
    )
    reads = 3 if recipe.remat == "layers" else 2
    added = 2 * gradients if recipe.accumulate > 1 else 0
    state = trainer.abstract_state()
    return recipe.accumulate * (reads * used + added) + 2 * shard_bytes((state.parameters, state.optimizer)) + gradients
