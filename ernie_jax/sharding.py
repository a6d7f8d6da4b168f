"""Mesh and logical axes: the only place that knows mesh axis names.

Parameters, cache pages and batches carry logical axis names; a frozen table maps each to mesh axes. On one device every
mesh axis has size 1 and the table maps to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "expert", "tensor")

# Every logical axis has an entry, None included: a name without one is an error, not a replicated axis.
_REPLICATED = dict.fromkeys(
    ("vocab", "embed", "embed_pair", "kv_head", "group_head", "head_dim", "gate_up", "mlp", "expert", "expert_score")
)
PRESETS: Mapping[str, Mapping[str, str | None]] = MappingProxyType(
    {"single": MappingProxyType({**_REPLICATED, "page": None, "group": "data"})}
)


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """Build the mesh of one device, the first of `devices` (default: of this process)."""
    device = (devices or jax.local_devices())[0]
    return jax.make_mesh((1,) * 3, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=[device])


def spec(axes: tuple[str | None, ...], preset: str = "single") -> P:
    """Map logical axes to a PartitionSpec; raises KeyError on an unknown axis."""
    table = PRESETS[preset]
    return P(*(None if axis is None else table[axis] for axis in axes))


def shard_abstract(state: nnx.State, mesh: Mesh, preset: str = "single") -> nnx.State:
    """Give every leaf of an abstract state the sharding that its `axes` metadata asks for."""

    def place(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        sharding = NamedSharding(mesh, spec(variable.get_metadata("axes"), preset))
        return variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))

    return jax.tree.map(place, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
