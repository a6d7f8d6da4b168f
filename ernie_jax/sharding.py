"""Meshes and logical axes: the only place that knows mesh axis names.

Parameters, cache pages and batches carry logical axis names. A preset's table maps each to mesh axes; a Layout is a
preset on a mesh. The mesh axes mean

    data     groups of sequences: each group has its own cache pages, and computes attention for its own tokens
    expert   whole experts, and attention heads
    tensor   slices of every expert, and attention heads

Experts are spread over data and expert together, dense layers and the vocabulary over all three.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.ops.quantized import group_size

MESH_AXES = ("data", "expert", "tensor")

Table = Mapping[str, tuple[str, ...]]

# Every logical axis has an entry, the empty one included: a name without one is an error, not a replicated axis.
_PARAMETER_AXES = (
    *("vocab", "embed", "embed_pair", "kv_head", "group_head", "head_dim"),
    *("gate_up", "mlp", "expert", "expert_mlp", "expert_score", "rank"),
)
_REPLICATED = dict.fromkeys((*_PARAMETER_AXES, "group", "page", "token"), ())
_SHARDED = MappingProxyType(
    _REPLICATED
    | {
        "group": ("data",),
        "token": MESH_AXES,
        "page": ("data",),
        "kv_head": ("expert", "tensor"),
        "expert": ("data", "expert"),
        "expert_mlp": ("tensor",),
        "mlp": MESH_AXES,
        "vocab": MESH_AXES,
    }
)
_EXCHANGED = MappingProxyType(_SHARDED | {"kv_head": (), "mlp": ()})
_FSDP = MappingProxyType(_REPLICATED | dict.fromkeys(("group", "token", "embed"), MESH_AXES))


@dataclasses.dataclass(frozen=True)
class Preset:
    """A way to spread a model over a mesh.

    Attributes:
      about: what it does, for people.
      axes: the mesh axes that --mesh may name beside data; without --mesh the first takes all devices.
      splits_heads: spread the key/value heads over expert and tensor, as far as there are heads; what is left of these
        axes, or all of expert where heads stay whole, becomes data.
      exchanges: tokens stay on their shard, and travel to the experts and back by an all-to-all.
      serves: it runs the engine; the others are for training.
    """

    about: str
    table: Table
    axes: tuple[str, ...]
    splits_heads: bool = True
    exchanges: bool = False
    serves: bool = True


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "single": Preset("one device", _SHARDED, ()),
        "expert": Preset("whole experts on each device, attention split by heads", _SHARDED, ("expert",)),
        "expert+tensor": Preset(
            "experts split over one axis and cut into slices over another, attention split by heads",
            _SHARDED,
            ("expert", "tensor"),
        ),
        "expert+data": Preset(
            "whole experts on each device, attention and cache split by sequence",
            _SHARDED,
            ("expert", "tensor"),
            splits_heads=False,
        ),
        "exchange": Preset(
            "as expert+data, but tokens travel to their experts and back, and dense layers are on every device",
            _EXCHANGED,
            ("expert",),
            splits_heads=False,
            exchanges=True,
        ),
        "tensor": Preset("a slice of every matrix on each device, attention split by heads", _SHARDED, ("tensor",)),
        "fsdp": Preset(
            "every matrix cut over all devices and gathered for use; for training",
            _FSDP,
            (),
            splits_heads=False,
            serves=False,
        ),
    }
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A preset on a mesh: where every array of a program lies."""

    preset: str
    mesh: Mesh

    @property
    def table(self) -> Table:
        return PRESETS[self.preset].table

    @property
    def groups(self) -> int:
        """How many groups the sequences are split into."""
        return self.size("group")

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    @property
    def capability(self) -> str | None:
        """Return the compute capability of its GPUs, as in "9.0"; they need not be here."""
        return getattr(self.mesh.devices.flat[0], "compute_capability", None)

    def size(self, logical: str) -> int:
        """Return the number of shards of a logical axis."""
        return math.prod(self.mesh.shape[axis] for axis in self.table[logical])

    def spec(self, axes: tuple[str | None, ...]) -> P:
        """Map logical axes to a PartitionSpec; raises KeyError on an unknown axis."""
        return P(*(None if axis is None else self.table[axis] or None for axis in axes))

    def sharding(self, axes: tuple[str | None, ...] = ()) -> NamedSharding:
        """Return where an array of these logical axes lies; without axes, on every device."""
        return NamedSharding(self.mesh, self.spec(axes))

    def place(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
        """Return where a parameter lies.

        Experts whose embed axis is cut, which is gathered for use, are cut by whole experts if these divide: what is
        gathered then lies in order, and kernels need no transposed copy of it.
        """
        cut = self.table["embed"]
        if cut and {"expert", "embed"} <= set(axes) and shape[axes.index("expert")] % self.size("embed") == 0:
            return NamedSharding(self.mesh, P(*(cut if axis == "expert" else None for axis in axes)))
        return self.sharding(axes)

    def put(self, array: np.ndarray, axes: tuple[str | None, ...] = ()) -> jax.Array:
        """Place a host array that every process has whole and equal."""
        sharding = self.sharding(axes)
        if sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def shard(self) -> Shard:
        """Return the view of one shard, for use inside `jax.shard_map` over the mesh."""
        return Shard(self.table, self.mesh.shape, PRESETS[self.preset].exchanges)

    def whole(self) -> Shard:
        """Return the view of a program that XLA divides: all of everything, but that it can divide parts by hand."""
        return Shard(_REPLICATED, {}, layout=self)

    def describe(self) -> str:
        """Name preset and mesh in a few words."""
        sizes = ",".join(f"{axis}:{size}" for axis, size in self.mesh.shape.items() if size > 1)
        return f"{self.preset} ({sizes})" if sizes else self.preset


class Shard:
    """What one shard of a program knows of the others, in logical axes; outside `jax.shard_map` use WHOLE.

    Attributes:
      exchanges: each shard keeps the rows of its own tokens, instead of all shards those of all.
      layout: of a view that is whole, over which devices parts can be divided by hand; None: there are no others.
    """

    def __init__(self, table: Table, sizes: Mapping[str, int], exchanges: bool = False, layout: Layout | None = None):
        self._table, self._sizes, self.exchanges, self.layout = table, sizes, exchanges, layout

    def axes(self, *logical: str) -> tuple[str, ...]:
        """Return the mesh axes, larger than 1, that any of some logical axes is split over."""
        wanted = {axis for name in logical for axis in self._table[name] if self._sizes[axis] > 1}
        return tuple(axis for axis in MESH_AXES if axis in wanted)

    @property
    def attention_parts(self) -> tuple[str, ...]:
        """The logical axes over which attention is a sum: heads, and groups unless each keeps its own tokens."""
        return ("kv_head",) if self.exchanges else ("group", "kv_head")

    def size(self, *logical: str) -> int:
        """Return over how many shards logical axes are split."""
        return math.prod(self._sizes[axis] for axis in self.axes(*logical))

    def index(self, *logical: str) -> jax.Array | int:
        """Return which of `size` shards this is; the int 0 where nothing is split."""
        axes = self.axes(*logical)
        return jax.lax.axis_index(axes) if axes else 0

    def sum(self, x: jax.Array, *logical: str) -> jax.Array:
        """Add up what the shards of logical axes hold; every one gets the sum."""
        axes = self.axes(*logical)
        return jax.lax.psum(x, axes) if axes else x

    def max(self, x: jax.Array, *logical: str) -> jax.Array:
        """Take the greatest of what the shards of logical axes hold."""
        axes = self.axes(*logical)
        return jax.lax.pmax(x, axes) if axes else x


WHOLE = Shard(_REPLICATED, {})


def single(device: jax.Device | None = None) -> Layout:
    """Return the layout of one device, by default the first of this process."""
    return Layout("single", _make_mesh((1, 1, 1), [device or jax.local_devices()[0]]))


def make_layout(
    config: ModelConfig, devices: Sequence[jax.Device], mesh: str | None = None, preset: str | None = None
) -> Layout:
    """Spread a model over devices.

    Args:
      devices: of all processes, or of a compile-only topology; all of them are used, except by "single".
      mesh: as "expert:8" or "data:2,expert:4"; default: all devices on the preset's axis.
      preset: a name of PRESETS; default: by the mesh, else by the model: expert for experts, tensor for a dense model.

    Raises:
      UserError: on an unknown preset or axis, or sizes that fit neither the devices nor the model.
    """
    sizes = _parse_mesh(mesh) if mesh is not None else None
    preset = preset or _choose_preset(config, len(devices), sizes)
    if preset not in PRESETS:
        raise UserError(f"--sharding={preset}: unknown; choose one of {', '.join(PRESETS)}")
    if preset == "single":
        if sizes is not None and math.prod(sizes.values()) > 1:
            raise UserError(f"--mesh={mesh} is not one device; leave out --sharding=single or --mesh")
        return single(devices[0])
    count = len(devices)
    if sizes is None:
        sizes = _default_sizes(config, preset, count)
    asked = f"--mesh={mesh}" if mesh is not None else f"--sharding={preset} on {count} devices"
    _check_axes(asked, preset, sizes, config)
    if math.prod(sizes.values()) != count:
        raise UserError(
            f"{asked} is a mesh of {math.prod(sizes.values())} devices and there are {count}; "
            "its sizes must multiply to the number of devices"
        )
    sizes = _split_heads(config, preset, sizes)
    if problem := _misfit(config, preset, sizes):
        counts = [n for n in range(1, 2 * count + 1) if _fits(config, preset, n)]
        raise UserError(f"{asked}: {problem}; {preset} works on {', '.join(map(str, counts))} devices")
    return Layout(preset, _make_mesh(tuple(sizes[axis] for axis in MESH_AXES), devices))


def usable_devices(config: ModelConfig, count: int) -> int:
    """Return the largest number of devices, at most `count`, over which the default preset can spread a model."""
    return next(n for n in range(count, 0, -1) if n == 1 or _fits(config, _choose_preset(config, n, None), n))


def shard_abstract(state: nnx.State, layout: Layout) -> nnx.State:
    """Give every leaf of an abstract state the sharding that its `axes` metadata asks for."""

    def place(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        sharding = layout.place(variable.get_metadata("axes"), value.shape)
        return variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))

    return jax.tree.map(place, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def whole(array: jax.Array) -> np.ndarray:
    """Return all of an array in this process; every process whose devices have a part of it must ask for it."""
    if not (array.is_fully_addressable or array.is_fully_replicated):
        array = jax.jit(lambda x: x, out_shardings=NamedSharding(array.sharding.mesh, P()))(array)
    return np.asarray(array)


def shard_bytes(state: nnx.State) -> int:
    """Return the bytes that a device holds of an abstract state with shardings."""
    leaves = jax.tree.leaves(state)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _make_mesh(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> Mesh:
    # An axis may take part of a torus's axis: 8 devices of a 4x4 slice.
    grid = mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _parse_mesh(text: str) -> dict[str, int]:
    sizes = dict.fromkeys(MESH_AXES, 1)
    seen = set()
    for part in text.split(","):
        name, _, size = part.strip().partition(":")
        if name not in MESH_AXES:
            raise UserError(f"--mesh={text}: no axis {name!r}; the axes are {', '.join(MESH_AXES)}, as in expert:8")
        if name in seen:
            raise UserError(f"--mesh={text}: {name} is given twice")
        if not (size.isascii() and size.isdigit() and int(size) > 0):
            raise UserError(f"--mesh={text}: the size of {name} must be a positive number, as in {name}:4")
        seen.add(name)
        sizes[name] = int(size)
    return sizes


def _choose_preset(config: ModelConfig, count: int, sizes: dict[str, int] | None) -> str:
    if sizes is None:
        if count == 1:
            return "single"
        if not config.is_moe:
            return "tensor"
        return "expert" if config.moe_num_experts % count == 0 else "expert+tensor"
    used = {axis for axis, size in sizes.items() if size > 1}
    if not used:
        return "single"
    if not config.is_moe or "expert" not in used and "tensor" in used:
        return "tensor"
    if "expert" in used:
        return "expert+tensor" if "tensor" in used else "expert"
    return "expert+data"


def _default_sizes(config: ModelConfig, preset: str, count: int) -> dict[str, int]:
    sizes = dict.fromkeys(MESH_AXES, 1)
    if preset == "expert+tensor":
        # As many whole experts as there are, but at least two slices of each: that is what the preset is for.
        experts = math.gcd(config.moe_num_experts or 1, count)
        if experts == count and count % 2 == 0:
            experts //= 2
        return sizes | {"expert": experts, "tensor": count // experts}
    return sizes | {(*PRESETS[preset].axes, "data")[0]: count}


def _check_axes(asked: str, preset: str, sizes: dict[str, int], config: ModelConfig) -> None:
    axes = PRESETS[preset].axes
    if "expert" in axes and not config.is_moe:
        raise UserError(f"{asked}: this model has no experts; use --sharding=tensor")
    for axis, size in sizes.items():
        if size > 1 and axis not in ("data", *axes):
            raise UserError(
                f"{asked}: sharding {preset} has no use for the axis {axis}; its axes are {', '.join(('data', *axes))}"
            )


def _split_heads(config: ModelConfig, preset: str, sizes: dict[str, int]) -> dict[str, int]:
    """Turn the part of expert and tensor that exceeds the key/value heads into groups of sequences (data)."""
    sizes = dict(sizes)
    if not PRESETS[preset].splits_heads:
        return sizes | {"data": sizes["data"] * sizes["expert"], "expert": 1}
    split = sizes["expert"] * sizes["tensor"]
    excess = split // math.gcd(split, config.num_key_value_heads)
    for axis in ("expert", "tensor"):
        moved = math.gcd(excess, sizes[axis])
        sizes[axis] //= moved
        sizes["data"] *= moved
        excess //= moved
    return sizes


def _misfit(config: ModelConfig, preset: str, sizes: dict[str, int]) -> str | None:
    """Say which dimension of a model does not divide over a mesh, or None."""
    table = PRESETS[preset].table

    def inputs(size: int, what: str) -> tuple[int, str]:
        if config.quantize != "int4":
            return size, what
        group = group_size(size)  # its weights share a scale
        return size // group, f"{what} in int4's groups of {group}"

    dimensions = []
    if config.is_moe:
        dimensions += [
            ("expert", config.moe_num_experts, "experts"),
            ("expert_mlp", *inputs(config.moe_intermediate_size, "width of an expert")),
            ("mlp", *inputs(config.moe_shared_intermediate_size, "width of the shared experts")),
        ]
    dimensions += [
        ("kv_head", config.num_key_value_heads, "key/value heads"),
        ("mlp", *inputs(config.intermediate_size, "intermediate size")),
        ("vocab", config.vocab_size, "vocabulary"),
        ("embed", *inputs(config.hidden_size, "hidden size")),
    ]
    for logical, size, what in dimensions:
        shards = math.prod(sizes[axis] for axis in table[logical])
        if size % shards:
            return f"the model's {what} ({size:,}) cannot be split {shards} ways"
    return None


def _fits(config: ModelConfig, preset: str, count: int) -> bool:
    sizes = _default_sizes(config, preset, count)
    return _misfit(config, preset, _split_heads(config, preset, sizes)) is None
