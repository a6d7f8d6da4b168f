"""Names of TPU slices and GPU hosts, and the devices to plan or compile for."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping

import jax
from jax.experimental import topologies

from ernie_jax.chips import CHIPS, Chip
from ernie_jax.errors import UserError

# Shapes that Cloud TPU offers. Beyond these, chips with three axes come in cubes: all sizes are multiples of four.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_SHAPES = {
    "v4": _SMALL,
    "v5e": _FLAT,
    "v5p": ((1, 1, 1), *_SMALL),
    "v6e": _FLAT,
    "tpu7x": ((1, 1, 1), *_SMALL),
}
# The cloud's names, and how many of what they count make a chip: v5p-8 has 8 TensorCores, that is 4 chips.
_CLOUD = {"v4": ("v4", 2), "v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1), "tpu7x": ("tpu7x", 2)}
# What libtpu reads when it is loaded: do not ask a metadata server, nor complain that this is no TPU machine (the last
# two change nothing else), and let other processes compile, too.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
_ALIASES = {"v5litepod": "v5e", "trillium": "v6e", "ironwood": "tpu7x"}


@dataclasses.dataclass(frozen=True)
class StandIn:
    """Take a device's place in a mesh that only arithmetic looks at."""

    id: int
    platform: str = "abstract"
    device_kind: str = "abstract"
    process_index: int = 0


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice, or the GPUs of one host.

    Attributes:
      shape: chips along each axis of the torus or mesh; of GPUs, their number.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name as libtpu writes it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        """Hosts; a slice of v5e or v6e larger than one host is made of hosts with 4 chips in use each."""
        return 1 if self.chips <= self.chip.host_chips else self.chips // 4

    @property
    def link_bandwidth(self) -> float:
        """Bytes/s that a device can send to the others, by the ports that lead to neighbours within the slice.

        A chip at a corner has the fewest, and a collective waits for it: one along each axis, two where the axis is
        closed to a ring. v5e and v6e close axes of 16; the others close all when every one is a multiple of four.
        """
        if self.chip.platform == "gpu":
            return self.chip.port_bandwidth
        cube = len(self.shape) == 3 and all(size % 4 == 0 for size in self.shape)
        ports = sum(2 if cube or size == 16 else 1 for size in self.shape if size > 1)
        return ports * self.chip.port_bandwidth / self.chip.devices

    def stand_ins(self) -> list[StandIn]:
        """Return as many stand-ins as there are devices: enough to lay a model out and count."""
        return [StandIn(i) for i in range(self.devices)]

    def compile_devices(self) -> list:
        """Return JAX devices to compile for, without the hardware.

        Raises:
          UserError: if libtpu is not installed, or does not know the slice.
        """
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(f"--topology={self.name}: TPU programs are compiled by libtpu; run `pip install libtpu`")
        shape = (*self.shape, 1)[:3]
        # v4's two cores are one device, as Cloud TPUs run it.
        options = {"chip_config_name": "megacore"} if self.chip.name == "v4" else {}
        bounds = tuple(map(min, shape, (2, 2, 1)))
        try:
            with _environment(_LIBTPU):
                return topologies.get_topology_desc(
                    platform="tpu", topology_name=self.name, chips_per_host_bounds=bounds, **options
                ).devices
        except jax.errors.JaxRuntimeError as error:
            raise UserError(f"--topology={self.name}: libtpu refuses it: {str(error).splitlines()[0]}") from None


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and put them back: processes started later are not to inherit them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def parse_topology(name: str) -> Topology:
    """Read a topology's name.

    Args:
      name: a slice as libtpu writes it (v5e:2x4) or as the cloud does (v5litepod-8, v5p-64), or GPUs (h100:8).

    Raises:
      UserError: if there is no such chip or slice; the sentence lists those there are.
    """
    match = re.fullmatch(r"([a-z0-9\-]+?)[:\-](\d+(?:x\d+)*)", name.strip().lower())
    kind = match and _ALIASES.get(match[1], match[1])
    if kind not in CHIPS:
        raise UserError(f"--topology={name}: unknown; write {_known_forms()}")
    chip, sizes = CHIPS[kind], tuple(map(int, match[2].split("x")))
    if chip.platform == "gpu":
        if len(sizes) > 1 or not 1 <= sizes[0] <= chip.most_chips:
            raise UserError(f"--topology={name}: write {kind}:1 to {kind}:{chip.most_chips}, the GPUs of one host")
        return Topology(chip, sizes)
    per_chip = _CLOUD[kind][1]
    if len(sizes) == 1 and sizes[0] % per_chip == 0:
        shape = _shape_of(kind, sizes[0] // per_chip)
    else:
        shape = sizes if sizes in slice_shapes(chip) else None
    if shape is None:
        some = ", ".join(cloud_name(Topology(chip, shape)) for shape in _SHAPES[kind])
        raise UserError(
            f"--topology={name}: no such slice of {chip.title}; its shapes are {_known_shapes(chip)}; its names in the "
            f"cloud {some}{' and so on' if len(_SHAPES[kind][0]) == 3 else ''}"
        )
    return Topology(chip, shape)


def slice_shapes(chip: Chip) -> tuple[tuple[int, ...], ...]:
    """Return the shapes that slices of a TPU have, or the numbers of GPUs on a host; smallest first."""
    if chip.platform == "gpu":
        return ((1,), (2,), (4,), (8,))
    shapes = list(_SHAPES[chip.name])
    if len(shapes[0]) == 3:
        sides = range(4, chip.most_chips // 16 + 1, 4)
        for a, b in itertools.combinations_with_replacement(sides, 2):
            if a * b * b > chip.most_chips:
                continue
            shapes += [(a, b, c) for c in range(b, chip.most_chips // (a * b) + 1, 4)]
    return tuple(sorted(shapes, key=lambda shape: (math.prod(shape), sum(shape))))


def cloud_name(topology: Topology) -> str | None:
    """Return the cloud's name of a slice, None for GPUs and for shapes that need their own."""
    kind = topology.chip.name
    if topology.chip.platform == "gpu" or _shape_of(kind, topology.chips) != topology.shape:
        return None
    prefix, per_chip = _CLOUD[kind]
    return f"{prefix}-{topology.chips * per_chip}"


def _shape_of(kind: str, chips: int) -> tuple[int, ...] | None:
    """Return the shape that a number of chips gets: of those there are, the one most like a cube."""
    return next((shape for shape in slice_shapes(CHIPS[kind]) if math.prod(shape) == chips), None)


def _known_forms() -> str:
    slices: dict[str, list[str]] = {}
    for name in _SHAPES:
        slices.setdefault(_known_shapes(CHIPS[name]), []).append(name)
    tpus = "; ".join(f"{', '.join(names)} with {shapes}" for shapes, names in slices.items())
    gpus = ", ".join(name for name, chip in CHIPS.items() if chip.platform == "gpu")
    return (
        f"CHIP:SHAPE for a TPU slice ({tpus}), its name in the cloud, as {cloud_name(parse_topology('v5e:2x4'))} or "
        f"{cloud_name(parse_topology('v5p:2x4x4'))}, or CHIP:COUNT for the GPUs of one host ({gpus}), as h100:8"
    )


def _known_shapes(chip: Chip) -> str:
    shapes = ["x".join(map(str, shape)) for shape in _SHAPES[chip.name]]
    if len(_SHAPES[chip.name][0]) == 3:
        shapes.append(f"AxBxC of multiples of 4, A <= B <= C, up to {chip.most_chips:,} chips")
    return ", ".join(shapes)
