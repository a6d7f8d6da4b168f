"""Plan: whether a model fits a TPU slice or GPU host under a sharding, what it costs there, and what would fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax.numpy as jnp

from ernie_jax.chips import CHIPS, Chip
from ernie_jax.config import ModelConfig
from ernie_jax.engine.aot import decode_shape, lower_step, prefill_shape
from ernie_jax.engine.cache import PAGE_SIZE, check_kv_dtype, parse_kv_dtype
from ernie_jax.errors import UserError
from ernie_jax.planner import costs
from ernie_jax.planner.compilation import Program, TooLarge, compile_all
from ernie_jax.planner.costs import Cost, Roofline
from ernie_jax.planner.hlo import Collective
from ernie_jax.planner.topology import Topology, slice_shapes
from ernie_jax.sharding import PRESETS, Layout, make_layout

_KEPT_FREE = 0.1  # of a GPU's memory: what the engine leaves for temporaries
_GUESS = 0.02  # of a TPU's memory for temporaries, where nothing was compiled
_CLOSE = 1.02  # a default that is at most this much slower is the best all the same

Announce = Callable[[str], None]


def _silent(_: str) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to run where.

    Attributes:
      batch: sequences decoded at the same time.
      context: tokens of each that the cache has room for.
      chunk: prompt tokens of a prefill step.
      kv_dtype: of the cache; None: `dtype`.
    """

    config: ModelConfig
    topology: Topology
    dtype: jnp.dtype
    batch: int
    context: int
    chunk: int
    kv_dtype: jnp.dtype | None = None

    def __post_init__(self):
        for name in ("batch", "context", "chunk"):
            if getattr(self, name) < 1:
                flag = "prefill_chunk" if name == "chunk" else name
                raise UserError(f"--{flag}={getattr(self, name)}: it must be at least 1")
        if self.context > self.config.max_position_embeddings:
            raise UserError(
                f"--context={self.context}: the model was made for at most "
                f"{self.config.max_position_embeddings:,} tokens (max_position_embeddings)"
            )
        object.__setattr__(self, "chunk", min(self.chunk, self.context))

    @property
    def cached(self) -> jnp.dtype:
        """The dtype of the cache."""
        return jnp.dtype(self.dtype if self.kv_dtype is None else self.kv_dtype)


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One step: its cost on the busiest device, its collectives, its roofline, and the program if there is one."""

    tokens: int
    cost: Cost
    collectives: tuple[Collective, ...]
    roofline: Roofline
    program: Program | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A request under one sharding; bytes are those of a device.

    Attributes:
      layout: on stand-ins for the devices.
      weights: all of them, those of multi-token prediction included.
      cache: pages for `batch` sequences of `context` tokens, and the scratch page.
      temporaries: what the steps need beyond; the compiler's if there are programs or a problem, else assumed.
      problem: why a program could not be compiled.
    """

    request: Request
    layout: Layout
    weights: int
    cache: int
    temporaries: int
    decode: StepPlan
    prefill: StepPlan
    problem: str | None = None

    @property
    def compiled(self) -> bool:
        return self.decode.program is not None

    @property
    def memory(self) -> int:
        """What a program can use."""
        return int(self.request.topology.chip.device_memory)

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.temporaries

    @property
    def left(self) -> int:
        return self.memory - self.total

    @property
    def fits(self) -> bool:
        return self.problem is None and self.left >= 0

    @property
    def page_bytes(self) -> int:
        return PAGE_SIZE * costs.token_bytes(self.request.config, self.request.cached, self.layout)

    @property
    def group_pages(self) -> int:
        """Pages that a data group has room for beside weights and temporaries, without the scratch page."""
        return max(0, (self.memory - self.weights - self.temporaries) // self.page_bytes - 1)

    @property
    def cache_tokens(self) -> int:
        """How many cached tokens fit in all."""
        return self.layout.groups * self.group_pages * PAGE_SIZE

    @property
    def most_sequences(self) -> int:
        """How many sequences of `context` tokens fit."""
        return self.layout.groups * (self.group_pages // _pages(self.request.context))

    @property
    def longest_context(self) -> int:
        """How many tokens of each of `batch` sequences fit, at most the model's limit."""
        rows = -(-self.request.batch // self.layout.groups)
        return min(self.group_pages // rows * PAGE_SIZE, self.request.config.max_position_embeddings)


def make_plan(
    request: Request,
    sharding: str | None = None,
    mesh: str | None = None,
    *,
    build: bool = True,
    announce: Announce = _silent,
) -> Plan:
    """Plan a request for a preset or mesh, or for the best preset.

    The best is the one whose decode step has the lowest roofline of those that fit; the one that the engine takes by
    default wins where it is as good.

    Args:
      build: compile for TPUs, unless it is plain that the model does not fit.
      announce: is told what is being compiled.

    Raises:
      UserError: if the preset or mesh suits neither topology nor model.
    """
    devices = request.topology.stand_ins()
    if sharding is not None or mesh is not None:
        layout = make_layout(request.config, devices, mesh, sharding)
        _check_serves(layout)
        check_kv_dtype(request.config, request.cached, layout, request.topology.chip.platform)
        plan = estimate(request, layout)
        return measure(plan, announce) if build else plan
    plans = [plan for plan in estimate_all(request).values() if isinstance(plan, Plan)]
    try:
        default = make_layout(request.config, devices).preset
    except UserError:
        if not plans:
            raise
        default = None
    fastest = min((plan.decode.roofline.seconds for plan in plans if plan.fits), default=0.0)

    def rank(plan: Plan) -> tuple:
        close = plan.layout.preset == default and plan.decode.roofline.seconds <= _CLOSE * fastest
        return not plan.fits, not close, plan.decode.roofline.seconds if plan.fits else plan.total

    plans.sort(key=rank)
    if not build:
        return plans[0]
    first = None
    for plan in plans:
        if (measured := measure(plan, announce)).fits:
            return measured
        first = first or measured
    return first


def estimate_all(request: Request) -> dict[str, Plan | str]:
    """Estimate every preset that serves; those that do not suit the topology or model come with the reason."""
    found: dict[str, Plan | str] = {}
    for name, preset in PRESETS.items():
        if not preset.serves or (name == "single") != (request.topology.devices == 1):
            continue
        try:
            layout = make_layout(request.config, request.topology.stand_ins(), None, name)
            check_kv_dtype(request.config, request.cached, layout, request.topology.chip.platform)
        except UserError as error:
            found[name] = str(error)
        else:
            found[name] = estimate(request, layout)
    return found


def estimate(request: Request, layout: Layout, temporaries: int | None = None) -> Plan:
    """Count what a request needs, without a compiler.

    Args:
      temporaries: bytes to assume; default: a tenth of a GPU, which the engine keeps free, a little of a TPU.
    """
    config, dtype, chip = request.config, request.dtype, request.topology.chip
    if temporaries is None:
        temporaries = int((_KEPT_FREE if chip.platform == "gpu" else _GUESS) * chip.device_memory)
    loads = (
        costs.decode_load(layout, request.batch, request.context),
        costs.prefill_load(request.chunk, request.context),
    )
    steps = []
    for load in loads:
        cost = costs.step_cost(config, dtype, layout, load, request.cached)
        exchanged = tuple(costs.step_collectives(config, dtype, layout, load, chip.platform))
        steps.append(
            StepPlan(load.tokens, cost, exchanged, costs.roofline(cost, exchanged, request.topology), program=None)
        )
    return Plan(
        request,
        layout,
        costs.weight_bytes(config, dtype, layout),
        _cache_pages(request, layout) * PAGE_SIZE * costs.token_bytes(config, request.cached, layout),
        temporaries,
        *steps,
    )


def measure(plan: Plan, announce: Announce = _silent) -> Plan:
    """Compile a plan's steps and put in what the compiler says; a plan for GPUs comes back as it is.

    So does one whose weights and cache alone exceed the memory.
    """
    request, layout = plan.request, plan.layout
    if request.topology.chip.platform != "tpu" or plan.weights + plan.cache > plan.memory:
        return plan
    devices = request.topology.compile_devices()
    announce(f"compiling for {request.topology.name}, sharding {layout.describe()}: about a minute at most")
    sizes = ",".join(f"{axis}:{size}" for axis, size in layout.mesh.shape.items())
    target = make_layout(request.config, devices, None if layout.preset == "single" else sizes, layout.preset)
    dtypes = {"dtype": request.dtype, "kv_dtype": request.cached}
    shapes = {
        "decode": decode_shape(request.config, target, request.batch, request.context, **dtypes),
        "prefill": prefill_shape(request.config, target, request.chunk, request.context, **dtypes),
    }
    pages = _cache_pages(request, target)
    # Weights that take no part in a step are no argument of it, but lie in memory all the same.
    resident = plan.weights - costs.unused_bytes(request.config, request.dtype, layout) + plan.cache
    try:
        programs = compile_all(
            {
                name: lower_step(request.config, target, shape=shape, group_pages=pages, **dtypes)
                for name, shape in shapes.items()
            }
        )
    except TooLarge as error:
        temporaries = plan.temporaries if error.needed is None else error.needed - resident
        return dataclasses.replace(plan, temporaries=temporaries, problem=str(error))
    return dataclasses.replace(
        plan,
        temporaries=max(program.arguments + program.temporaries for program in programs.values()) - resident,
        **{name: _with_program(getattr(plan, name), program, request) for name, program in programs.items()},
    )


def suggest(plan: Plan) -> Iterator[str]:
    """Name what would fit instead of a plan that does not: flags and what they bring, by estimates."""
    request = plan.request

    def fitting(changed: Request) -> Plan | None:
        plans = [p for p in estimate_all(changed).values() if isinstance(p, Plan) and p.fits]
        return min(plans, key=lambda p: p.decode.roofline.seconds, default=None)

    if other := fitting(request):
        yield f"--sharding={other.layout.preset}"
    if request.dtype.itemsize > 2 and (other := fitting(dataclasses.replace(request, dtype=jnp.dtype(jnp.bfloat16)))):
        yield f"--dtype=bfloat16 --sharding={other.layout.preset}"
    smaller = {None: ("int8", "int4"), "int8": ("int4",), "fp8": ("int4",), "int4": ()}  # of the same, int8
    for form in smaller[request.config.quantize]:
        config = dataclasses.replace(request.config, quantize=form)
        if other := fitting(dataclasses.replace(request, config=config)):
            yield f"--quantize={form} --sharding={other.layout.preset}"
            break
    narrow = "fp8" if request.topology.chip.platform == "tpu" else "int8"  # on TPUs there is a kernel for fp8 alone
    narrower = dataclasses.replace(request, kv_dtype=parse_kv_dtype(narrow, request.dtype))
    if request.cached.itemsize > 1 and (other := fitting(narrower)):
        yield f"--kv_dtype={narrow} --sharding={other.layout.preset}"
    if 0 < plan.most_sequences < request.batch:
        yield f"--batch={plan.most_sequences}, each of {request.context:,} tokens"
    if PAGE_SIZE <= plan.longest_context < request.context:
        yield f"--context={plan.longest_context}, of {request.batch} sequences"
    own = request.topology.chip
    chips = [own]
    if not smallest_slice(request, own):
        host = "host" if own.platform == "gpu" else "slice"
        yield f"no {host} of {own.title} is large enough"
        chips = [chip for chip in CHIPS.values() if chip.platform == own.platform and chip != own]
    for chip in chips:
        if found := smallest_slice(request, chip):
            what = f"the fewest of {chip.title} that do" if chip.platform == "gpu" else "the smallest slice that does"
            yield f"--topology={found[0].name} --sharding={found[1]}, {what}"


def smallest_slice(request: Request, chip: Chip) -> tuple[Topology, str] | None:
    """Return the smallest slice of a TPU, or number of GPUs, that fits a request, and the preset it does with."""
    tried = set()
    for shape in slice_shapes(chip):
        if math.prod(shape) in tried:
            continue
        tried.add(math.prod(shape))
        topology = Topology(chip, shape)
        plan = make_plan(dataclasses.replace(request, topology=topology), build=False)
        if plan.fits:
            return topology, plan.layout.preset
    return None


def _check_serves(layout: Layout) -> None:
    if not PRESETS[layout.preset].serves:
        serving = ", ".join(name for name, preset in PRESETS.items() if preset.serves)
        raise UserError(f"--sharding={layout.preset} is for training; plan answers for generation: {serving}")


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE_SIZE)


def _cache_pages(request: Request, layout: Layout) -> int:
    """Return the pages of a data group, the scratch page included."""
    return -(-request.batch // layout.groups) * _pages(request.context) + 1


def _with_program(step: StepPlan, program: Program, request: Request) -> StepPlan:
    """Put a program in; of a ragged exchange it has the buffers only, so that what is sent stays as estimated."""
    counted = [item for item in program.collectives if item.kind != "ragged-all-to-all"]
    counted += [item for item in step.collectives if item.kind == "ragged-all-to-all"]
    return dataclasses.replace(
        step,
        program=program,
        collectives=program.collectives,
        roofline=costs.roofline(step.cost, counted, request.topology),
    )
