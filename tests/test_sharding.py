"""Layouts: which mesh a wish becomes, and which wishes are refused."""

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec as P

from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.sharding import MESH_AXES, PRESETS, make_layout, usable_devices

CONFIGS = "configs/ernie-4.5-"


@pytest.fixture(scope="module")
def config():
    """The 21B model: 64 experts, 4 key/value heads."""
    return ModelConfig.from_file(f"{CONFIGS}21b-a3b.json")


@pytest.fixture(scope="module")
def dense():
    """The 0.3B model: no experts, 2 key/value heads."""
    return ModelConfig.from_file(f"{CONFIGS}0.3b.json")


def sizes(layout):
    return tuple(layout.mesh.shape[axis] for axis in MESH_AXES)


@pytest.mark.parametrize(
    ("count", "mesh", "preset", "expected"),
    [
        (1, None, None, ("single", (1, 1, 1))),
        (2, None, None, ("expert", (1, 2, 1))),
        (4, None, None, ("expert", (1, 4, 1))),
        (8, None, None, ("expert", (2, 4, 1))),  # 4 key/value heads: two groups of sequences
        (8, "expert:8", None, ("expert", (2, 4, 1))),
        (8, "data:2,expert:4", None, ("expert", (2, 4, 1))),
        (8, "data:4, expert:2", None, ("expert", (4, 2, 1))),
        (8, "tensor:8", None, ("tensor", (2, 1, 4))),
        (8, "data:8", None, ("expert+data", (8, 1, 1))),
        (8, "expert:4,tensor:2", None, ("expert+tensor", (2, 2, 2))),
        (4, "expert:2,tensor:2", None, ("expert+tensor", (1, 2, 2))),
        (8, "expert:1,tensor:8", "expert+tensor", ("expert+tensor", (2, 1, 4))),
        (8, None, "expert+data", ("expert+data", (8, 1, 1))),
        (8, "expert:4,tensor:2", "expert+data", ("expert+data", (4, 1, 2))),
        (8, None, "exchange", ("exchange", (8, 1, 1))),
        (8, None, "tensor", ("tensor", (2, 1, 4))),
        (8, None, "expert+tensor", ("expert+tensor", (2, 2, 2))),
        (8, None, "fsdp", ("fsdp", (8, 1, 1))),
        (8, None, "single", ("single", (1, 1, 1))),
    ],
)
def test_what_a_wish_becomes(config, count, mesh, preset, expected):
    layout = make_layout(config, jax.devices()[:count], mesh, preset)
    assert (layout.preset, sizes(layout)) == expected


def test_a_dense_model_is_split_by_tensor(dense):
    layout = make_layout(dense, jax.devices())
    assert (layout.preset, sizes(layout)) == ("tensor", (4, 1, 2))
    with pytest.raises(UserError, match="no experts; use --sharding=tensor"):
        make_layout(dense, jax.devices(), preset="expert")


def test_every_array_is_split_over_every_device(config):
    """What is not is small, or a preset's purpose to have everywhere."""
    for preset in ("expert", "expert+tensor", "tensor"):
        layout = make_layout(config, jax.devices(), preset=preset)
        assert layout.size("expert") * layout.size("expert_mlp") == 8
        assert layout.size("mlp") == layout.size("vocab") == 8
        assert layout.size("group") * layout.size("kv_head") == 8


def test_experts_that_are_gathered_are_cut_between_experts(config):
    """Where there are as many as devices; all else that is gathered is cut along the model's width."""
    axes = ("expert", "gate_up", "expert_mlp", "embed")
    layout = make_layout(config, jax.devices(), preset="fsdp")
    devices = MESH_AXES
    assert layout.place(axes, (64, 2, 1536, 2560)).spec == P(devices, None, None, None)
    assert layout.place(axes, (60, 2, 1536, 2560)).spec == P(None, None, None, devices)
    assert layout.place(("vocab", "embed"), (103424, 2560)).spec == P(None, devices)
    shared = make_layout(config, jax.devices(), preset="expert")
    assert shared.place(axes, (64, 2, 1536, 2560)).spec == P(("data", "expert"), None, ("tensor",), None)


@pytest.mark.parametrize(
    ("count", "mesh", "preset", "message"),
    [
        (8, "expert:4", None, "--mesh=expert:4 is a mesh of 4 devices and there are 8"),
        (8, "model:8", None, "no axis 'model'; the axes are data, expert, tensor"),
        (8, "expert:4,expert:2", None, "expert is given twice"),
        (8, "expert:zero", None, "size of expert must be a positive number"),
        (8, "expert", None, "size of expert must be a positive number"),
        (8, "expert:0", None, "size of expert must be a positive number"),
        (8, "", None, "no axis ''"),
        (8, None, "pipeline", "--sharding=pipeline: unknown; choose one of single, expert"),
        (8, "expert:8", "single", "not one device"),
        (8, "tensor:8", "expert", "expert has no use for the axis tensor; its axes are data, expert"),
        (6, None, "expert", "the model's experts (64) cannot be split 6 ways; expert works on 1, 2, 4, 8 devices"),
        (3, None, "tensor", "the model's experts (64) cannot be split 3 ways; tensor works on 1, 2, 4 devices"),
    ],
)
def test_refused(config, count, mesh, preset, message):
    with pytest.raises(UserError) as error:
        make_layout(config, jax.devices()[:count], mesh, preset)
    assert message in str(error.value)


def test_the_vocabulary_must_divide(config):
    odd = dataclasses.replace(config, vocab_size=103423)
    with pytest.raises(UserError, match=r"vocabulary \(103,423\) cannot be split 8 ways; expert works on 1 devices"):
        make_layout(odd, jax.devices(), preset="expert")


def test_as_many_devices_as_divide(config, dense):
    assert [usable_devices(config, n) for n in (1, 2, 3, 6, 8)] == [1, 2, 2, 4, 8]
    assert [usable_devices(dense, n) for n in (1, 3, 8)] == [1, 2, 8]


def test_presets_are_frozen():
    with pytest.raises(TypeError):
        PRESETS["mine"] = PRESETS["expert"]
    with pytest.raises(TypeError):
        PRESETS["expert"].table["vocab"] = ()
