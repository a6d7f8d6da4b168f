"""Plans as text for people and as an object for programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ernie_jax.chips import GIB
from ernie_jax.engine.cache import kv_name
from ernie_jax.planner.costs import Roofline
from ernie_jax.planner.hlo import Collective
from ernie_jax.planner.plan import Plan, StepPlan
from ernie_jax.planner.topology import Topology, cloud_name
from ernie_jax.planner.training import TrainingPlan

_STEPS = ("decode", "prefill")


def describe(model: str, plan: Plan, advice: list[str]) -> str:
    """Lay a plan out for reading.

    Args:
      advice: what would fit, if the plan does not.
    """
    request, topology = plan.request, plan.request.topology
    quantized = f" and {request.config.forms} weights" if request.config.forms else ""
    cached = f", {kv_name(request.cached)} KV cache" if request.cached != request.dtype else ""
    lines = [
        f"{model}, {request.dtype.name}{quantized}{cached}, on {_place(topology)}",
        f"sharding {plan.layout.describe()}: batch {request.batch}, context {request.context:,}, prefill chunks of "
        f"{request.chunk:,}",
        "",
        _verdict(plan),
        *(f"  {line}" for line in advice),
        "",
        *_memory(plan),
        "",
        *_steps(plan),
    ]
    return "\n".join(lines)


def compare(plans: dict[str, Plan | str], best: str) -> str:
    """Table plans by preset; those that cannot be come with the reason."""
    head = ("sharding", "fits", "weights", "cache", "temporaries", "left", "tokens of KV", "decode ms", "prefill ms")
    rows = [head]
    notes = []
    for name, plan in plans.items():
        if isinstance(plan, str):
            notes.append(f"  {name}: {plan}")
            continue
        sizes = [_gib(size) for size in (plan.weights, plan.cache, plan.temporaries, plan.left)]
        times = [
            f"{1e3 * getattr(plan, step).roofline.seconds:.3g} {getattr(plan, step).roofline.bound}" for step in _STEPS
        ]
        fits = "yes" if plan.fits else "no"
        rows.append((name + (" *" if name == best else ""), fits, *sizes, f"{plan.cache_tokens:,}", *times))
        if plan.problem:
            notes.append(f"  {name}: {plan.problem}")
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  "
        + "  ".join(
            f"{cell:<{width}}" if column < 2 else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(["all shardings; memory in GiB, as above; * the one above", *lines, *notes])


def to_object(model: str, plan: Plan, advice: list[str]) -> dict:
    """Return a plan as an object that JSON can hold; bytes and seconds, of a device."""
    request, topology = plan.request, plan.request.topology
    return {
        "fits": plan.fits,
        "sharding": plan.layout.preset,
        "mesh": dict(plan.layout.mesh.shape),
        "model": model,
        "dtype": request.dtype.name,
        "quantize": request.config.quantize,
        "quantize_embedding": request.config.quantize_embedding,
        "kv_dtype": kv_name(request.cached),
        "topology": _topology_object(topology),
        "batch": request.batch,
        "context": request.context,
        "prefill_chunk": request.chunk,
        "compiled": plan.compiled,
        "problem": plan.problem,
        "would_fit": advice,
        "per_device": {
            "memory": plan.memory,
            "weights": plan.weights,
            "kv_cache": plan.cache,
            "temporaries": plan.temporaries,
            "total": plan.total,
            "left": plan.left,
        },
        "kv_tokens": plan.cache_tokens,
        "most_sequences": plan.most_sequences,
        **{name: _step_object(getattr(plan, name)) for name in _STEPS},
    }


def describe_training(model: str, plan: TrainingPlan) -> str:
    """Lay a plan of a training step out for reading."""
    recipe, topology = plan.recipe, plan.topology
    method = f"adapters of rank {recipe.lora_rank}" if recipe.lora else "all weights"
    device = _device_of(topology)
    verdict = f"FITS: {plan.left / GIB:.2f} GiB of {device} are left"
    if not plan.fits:
        alone = "" if plan.depths else "state and gradients alone are too much; nothing was compiled"
        verdict = f"DOES NOT FIT: {plan.problem or alone or f'{-plan.left / GIB:.2f} GiB of {device} are missing'}"
    lines = [
        f"{model}, {method}, on {_place(topology)}",
        f"sharding {plan.layout.describe()}: {recipe.batch_size} rows of {recipe.sequence_length:,} tokens in "
        f"{recipe.accumulate} parts, remat {recipe.remat}, moments in {recipe.moment_dtype}",
        "",
        verdict,
        "",
        f"memory of {device}, GiB",
        f"  state        {_gib(plan.state)}   what learns in float32, its moments, frozen weights",
    ]
    if plan.temporaries is None:
        return "\n".join([*lines, f"  usable       {_gib(plan.memory)}"])
    compiled = f"{plan.depths[-1]} of {plan.config.num_hidden_layers} layers, beside what the others hold"
    lines += [
        f"  temporaries  {_gib(plan.temporaries)}   compiled: {compiled}",
        f"  left         {_gib(plan.left)}   of {plan.memory / GIB:.2f} usable",
        "",
        *_best([_Best("", plan.tokens, plan.moved, plan.flops, plan.roofline)], _seconds),
        f"  of the TFLOP {plan.model_flops / 1e12:.3g} without what is done again",
        "",
        f"compiled for the slice in {plan.seconds:.0f} s",
    ]
    return "\n".join(lines)


def training_object(model: str, plan: TrainingPlan) -> dict:
    """Return a plan of a training step as an object that JSON can hold; bytes and seconds, of a device."""
    recipe = plan.recipe
    found = {
        "fits": plan.fits,
        "sharding": plan.layout.preset,
        "mesh": dict(plan.layout.mesh.shape),
        "model": model,
        "topology": _topology_object(plan.topology),
        "batch_size": recipe.batch_size,
        "sequence_length": recipe.sequence_length,
        "accumulate": recipe.accumulate,
        "problem": plan.problem,
        "compiled_layers": list(plan.depths),
        "per_device": {"memory": plan.memory, "state": plan.state, "temporaries": plan.temporaries, "left": plan.left},
    }
    if plan.roofline is None:
        return found
    return found | {
        "tokens": plan.tokens,
        **_roofline_object(plan.roofline),
        "moved_bytes": plan.moved,
        "flops": plan.flops,
        "model_flops": plan.model_flops,
        "compile_seconds": plan.seconds,
    }


def _topology_object(topology: Topology) -> dict:
    return {
        "name": topology.name,
        "cloud_name": cloud_name(topology),
        "chip": topology.chip.title,
        "chips": topology.chips,
        "devices": topology.devices,
        "hosts": topology.hosts,
    }


def _step_object(step: StepPlan) -> dict:
    return {
        "tokens": step.tokens,
        **_roofline_object(step.roofline),
        "weight_bytes": step.cost.weights,
        "cache_bytes": step.cost.cache,
        "flops": step.cost.flops,
        "collectives": [
            {
                "kind": c.kind,
                "count": c.count,
                "bytes": c.bytes,
                "group_size": c.group_size,
                "sent_bytes": c.link_bytes,
                "in_loop_of_unknown_length": c.open_loop,
            }
            for c in step.collectives
        ],
        "compile_seconds": step.program.seconds if step.program else None,
    }


def _roofline_object(roofline: Roofline) -> dict:
    return {
        "seconds": roofline.seconds,
        "bound": roofline.bound,
        "memory_seconds": roofline.memory,
        "compute_seconds": roofline.compute,
        "link_seconds": roofline.links,
        "serial_seconds": roofline.serial_seconds,
        "link_bytes": roofline.sent,
    }


def _place(topology: Topology) -> str:
    name, chip = cloud_name(topology), topology.chip
    hosts = f"{topology.hosts} host{'s' * (topology.hosts > 1)}"
    devices = f", {topology.devices} devices" if chip.devices > 1 else ""
    return f"{topology.name}{f' ({name})' if name else ''}: {topology.chips} x {chip.title}{devices}, {hosts}"


def _device_of(topology: Topology) -> str:
    return "a chip" if topology.chip.devices == 1 else "a device (half a chip)"


def _verdict(plan: Plan) -> str:
    device = _device_of(plan.request.topology)
    if plan.fits:
        return f"FITS: {plan.left / GIB:.2f} GiB of {device} are left"
    return f"DOES NOT FIT: {-plan.left / GIB:.2f} GiB of {device} are missing; what would:"


def _memory(plan: Plan) -> list[str]:
    request = plan.request
    if plan.compiled:
        parts = (f"{name} {getattr(plan, name).program.temporaries / GIB:.2f}" for name in _STEPS)
        source = f"compiled: {', '.join(parts)}"
    elif plan.problem:
        source = plan.problem
    elif request.topology.chip.platform == "gpu":
        source = "a tenth, which the engine keeps free; not compiled"
    else:
        source = "assumed; not compiled"
    room = f"KV cache for {plan.cache_tokens:,} tokens fits in all: {plan.most_sequences:,} x {request.context:,}"
    return [
        f"memory of {_device_of(request.topology)}, GiB",
        f"  weights      {_gib(plan.weights)}",
        f"  KV cache     {_gib(plan.cache)}   {request.batch} x {request.context:,} tokens"
        + (f" in {plan.layout.groups} groups" if plan.layout.groups > 1 else ""),
        f"  temporaries  {_gib(plan.temporaries)}   {source}",
        f"  total        {_gib(plan.total)}   of {plan.memory / GIB:.2f} usable",
        f"  left         {_gib(plan.left)}   {room}",
    ]


def _steps(plan: Plan) -> list[str]:
    steps = [getattr(plan, name) for name in _STEPS]
    columns = [
        _Best(title, step.tokens, step.cost.weights + step.cost.cache, step.cost.flops, step.roofline)
        for title, step in zip(("decode", "prefill chunk"), steps, strict=True)
    ]
    lines = [
        *_best(columns, _ms),
        "",
        "collectives of a step" + ("" if plan.compiled else " (as written, not compiled)"),
    ]
    for name, step in zip(_STEPS, steps, strict=True):
        lines += [f"  {name:<9}{_collective(item)}" for item in step.collectives] or [f"  {name:<9}none"]
    if plan.compiled:
        seconds = (f"{name} {getattr(plan, name).program.seconds:.1f} s" for name in _STEPS)
        lines += ["", f"compiled for the slice: {', '.join(seconds)}"]
    return lines


class _Best(NamedTuple):
    """A column of `_best`: tokens, bytes and operations of a step, and what they take."""

    title: str
    tokens: int
    moved: float
    flops: float
    roofline: Roofline


def _best(columns: list[_Best], time: Callable[[float], str]) -> list[str]:
    """Table what steps take at best, in times as `time` spells them."""

    def row(title: str, cell: Callable[[_Best], str]) -> str:
        return f"{title:<26}{''.join(f'{cell(column):>24}' for column in columns)}".rstrip()

    return [
        row("a step at best", lambda c: c.title),
        row("  tokens", lambda c: f"{c.tokens:,}"),
        row("  memory", lambda c: f"{_size(c.moved)}  {time(c.roofline.memory)}"),
        row("  compute", lambda c: f"{c.flops / 1e12:.3g} TFLOP  {time(c.roofline.compute)}"),
        row("  links", lambda c: f"{_size(c.roofline.sent)}  {time(c.roofline.links)}"),
        row("  roofline, bound by", lambda c: f"{c.roofline.bound}  {time(c.roofline.seconds)}"),
        row("  if nothing overlaps", lambda c: time(c.roofline.serial_seconds)),
        row("  tokens/s at most", lambda c: f"{c.tokens / c.roofline.seconds:,.0f}"),
    ]


def _collective(item: Collective) -> str:
    loop = " in each turn of a loop of unknown length" if item.open_loop else ""
    return (
        f"{item.count:>5} {item.kind:<19}{_size(item.bytes):>10} over {item.group_size:<5}"
        f"{_size(item.link_bytes):>10} sent by a device{loop}"
    )


def _gib(size: float) -> str:
    return f"{size / GIB:8.2f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms".rjust(9)


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s".rjust(9)


def _size(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
