"""Names of slices and hosts, the links within them, and the devices that libtpu makes of them."""

import itertools
import math

import pytest

from ernie_jax.chips import CHIPS, GIB
from ernie_jax.errors import UserError
from ernie_jax.planner import topology
from ernie_jax.planner.topology import Topology, cloud_name, parse_topology, slice_shapes


@pytest.mark.parametrize(
    ("name", "canonical", "chips", "devices", "hosts"),
    [
        ("v5e:2x4", "v5e:2x4", 8, 8, 1),
        ("v5e-8", "v5e:2x4", 8, 8, 1),
        ("V5litePod-16", "v5e:4x4", 16, 16, 4),
        ("v5e:16x16", "v5e:16x16", 256, 256, 64),
        ("v6e-256", "v6e:16x16", 256, 256, 64),
        ("v6e-1", "v6e:1x1", 1, 1, 1),
        # v4 and v5p count TensorCores, two a chip.
        ("v4-8", "v4:2x2x1", 4, 4, 1),
        ("v4-32", "v4:2x2x4", 16, 16, 4),
        ("v5p-8", "v5p:2x2x1", 4, 4, 1),
        ("v5p-64", "v5p:2x4x4", 32, 32, 8),
        ("v5p-128", "v5p:4x4x4", 64, 64, 16),
        ("v5p-384", "v5p:4x4x12", 192, 192, 48),
        ("v5p-512", "v5p:4x8x8", 256, 256, 64),
        ("v5p-1536", "v5p:8x8x12", 768, 768, 192),
        ("v5p:2x2x2", "v5p:2x2x2", 8, 8, 2),
        # tpu7x counts them too, and they are devices of their own.
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 4, 8, 1),
        ("tpu7x-16", "tpu7x:2x2x2", 8, 16, 2),
        ("ironwood-2", "tpu7x:1x1x1", 1, 2, 1),
        ("h100:8", "h100:8", 8, 8, 1),
        ("a100-80:2", "a100-80:2", 2, 2, 1),
        ("a100-40-4", "a100-40:4", 4, 4, 1),
        ("h200-3", "h200:3", 3, 3, 1),
    ],
)
def test_names(name, canonical, chips, devices, hosts):
    found = parse_topology(name)
    assert (found.name, found.chips, found.devices, found.hosts) == (canonical, chips, devices, hosts)
    assert parse_topology(found.name) == found
    assert len(found.stand_ins()) == devices


@pytest.mark.parametrize("chip", [CHIPS[name] for name in ("v4", "v5e", "v5p", "v6e", "tpu7x")], ids=lambda c: c.name)
def test_the_clouds_name_leads_back(chip):
    shapes = slice_shapes(chip)
    assert max(map(math.prod, shapes)) == chip.most_chips
    assert [math.prod(shape) for shape in shapes] == sorted(math.prod(shape) for shape in shapes)
    named = 0
    for shape in shapes:
        if name := cloud_name(Topology(chip, shape)):
            assert parse_topology(name).shape == shape
            named += 1
    assert named == len(set(map(math.prod, shapes)))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", ["v5e", "tpu7x", "2x2x1", "v5litepod-8", "v5p-64", "h100"]),
        ("v9:2x2", ["--topology=v9:2x2", "v4", "v5e", "v5p", "v6e", "tpu7x", "h200"]),
        ("v5e", ["unknown"]),
        ("a100:8", ["a100-40", "a100-80"]),
        ("v5e:3x5", ["TPU v5e", "2x4", "16x16", "v5litepod-256"]),
        ("v5e-5", ["TPU v5e", "v5litepod-4"]),
        ("v5e:2x2x1", ["TPU v5e", "2x2"]),
        ("v5p-6", ["TPU v5p", "v5p-8", "multiples of 4", "6,144"]),
        ("v5p-7", ["TPU v5p"]),
        ("v5p:4x4x2", ["TPU v5p", "A <= B <= C"]),
        ("v4:1x1x1", ["TPU v4", "2x2x1"]),
        ("h100:9", ["h100:1 to h100:8"]),
        ("h100:0", ["h100:1 to h100:8"]),
        ("h100:2x4", ["h100:1 to h100:8"]),
    ],
)
def test_unknown_names_list_the_known(name, words):
    with pytest.raises(UserError) as error:
        parse_topology(name)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("name", "ports", "port_bandwidth"),
    [
        ("v5e:1x1", 0, 50e9),
        ("v5e:2x4", 2, 50e9),
        ("v5e:8x16", 3, 50e9),
        ("v5e:16x16", 4, 50e9),
        ("v6e:4x4", 2, 100e9),
        ("v4:2x2x1", 2, 50e9),
        ("v5p:2x2x2", 3, 100e9),
        ("v5p:2x4x4", 3, 100e9),
        ("v5p:4x4x8", 6, 100e9),
        ("tpu7x:4x4x4", 6, 50e9),  # each of two devices has half a port
        ("h100:8", 1, 450e9),
    ],
)
def test_link_bandwidth_is_that_of_a_corner(name, ports, port_bandwidth):
    assert parse_topology(name).link_bandwidth == ports * port_bandwidth


def test_chips_are_whole_and_devices_their_parts():
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert chip.devices * chip.device_memory <= 1.01 * chip.memory
        assert chip.device_bandwidth * chip.devices == chip.bandwidth
        assert chip.device_flops * chip.devices == chip.flops
    # Twice one direction of all ports is what the vendor's pages give as a chip's bandwidth of both directions.
    both = {name: 2 * CHIPS[name].ports * CHIPS[name].port_bandwidth for name in ("v5e", "v5p", "v6e", "tpu7x", "h100")}
    assert both == {"v5e": 400e9, "v5p": 1200e9, "v6e": 800e9, "tpu7x": 1200e9, "h100": 900e9}


def neighbours(devices) -> int:
    """Count the fewest neighbours within reach that any chip has."""
    places = {tuple(device.coords) for device in devices}
    near = (sum(math.dist(a, b) == 1 for b in places) for a in places)
    return min(near)


@pytest.mark.parametrize(
    "name",
    ["v4-8", "v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4", "v5p:1x1x1", "v5p:2x2x2", "v6e-8", "tpu7x-2", "tpu7x:2x2x1"],
)
def test_libtpu_knows_the_slices(name):
    pytest.importorskip("libtpu")
    found = parse_topology(name)
    devices = found.compile_devices()
    assert len(devices) == found.devices
    assert len({tuple(device.coords) for device in devices}) == found.chips
    assert neighbours(devices) * found.chip.port_bandwidth / found.chip.devices == found.link_bandwidth


def test_libtpus_memory_is_in_the_table():
    """The compiler states what a program can use when it needs more."""
    pytest.importorskip("libtpu")
    import jax
    import jax.numpy as jnp
    import numpy as np

    for chip, shape in (("v4", "2x2x1"), ("v5e", "1x1"), ("v5p", "1x1x1"), ("v6e", "1x1"), ("tpu7x", "1x1x1")):
        device = parse_topology(f"{chip}:{shape}").compile_devices()[0]
        where = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array([device]), ("x",)), jax.sharding.PartitionSpec())
        large = jax.ShapeDtypeStruct((100_000, 1 << 20), jnp.bfloat16, sharding=where)
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as error:
            jax.jit(lambda x: x + 1).lower(large).compile()
        assert f"available HBM ({CHIPS[chip].device_memory / GIB:.2f}G)" in str(error.value)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install libtpu"):
        parse_topology("v5e-8").compile_devices()


def test_stand_ins_differ():
    assert all(a != b for a, b in itertools.combinations(parse_topology("v5e-8").stand_ins(), 2))
