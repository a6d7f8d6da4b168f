"""Plans of training steps: what is compiled, what is counted, and the smallest slice."""

import dataclasses

import pytest

from ernie_jax.chips import CHIPS, GIB
from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.planner import report, training
from ernie_jax.planner.compilation import Program, TooLarge
from ernie_jax.planner.hlo import Collective
from ernie_jax.planner.topology import parse_topology
from ernie_jax.planner.training import plan_training, smallest_slice
from ernie_jax.sharding import shard_bytes
from ernie_jax.train import Recipe
from ernie_jax.train.trainer import Trainer

pytest.importorskip("libtpu")

BATCH, LENGTH = 8, 64
RECIPE = Recipe(
    model="m", data="d", sources={"a": 1}, output="o", steps=10, batch_size=BATCH, sequence_length=LENGTH,
    accumulate=2, learning_rate=1e-3, remat="layers", expert_backend="batched",
)  # fmt: skip

PAIRS = dataclasses.replace(RECIPE, model="", checkpoint="m", preference={})


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def deep(small_config) -> ModelConfig:
    return dataclasses.replace(small_config, num_hidden_layers=9, moe_layer_start_index=2, moe_layer_end_index=8)


@pytest.fixture
def compiler(monkeypatch):
    """Stand for the compiler: a program needs 1 GiB, and sends as many GB in 10 gathers as it has layers."""
    asked = []

    def lower(trainer, held):
        asked.append((len(trainer.config.moe_layers), trainer.config.num_hidden_layers))
        return trainer, held

    def compile_all(lowerings):
        found = {}
        for name, (trainer, held) in lowerings.items():
            depth = trainer.config.num_hidden_layers
            sent = Collective("all-gather", depth * 10**8, 10, 4)
            found[name] = Program(shard_bytes(trainer.abstract_state()) + (held << 20), GIB, (sent,), 1.0)
        return found

    monkeypatch.setattr(Trainer, "lower", lower)
    monkeypatch.setattr(training, "compile_all", compile_all)
    return asked


def test_layers_that_are_not_compiled_need_what_one_more_did(deep, compiler):
    plan = plan_training(RECIPE, deep, parse_topology("v5e:2x2"), None, None, quiet)
    assert compiler == [(2, 2), (3, 3)] and plan.depths == (2, 3)
    assert plan.layout.preset == "fsdp" and plan.fits
    assert plan.roofline.sent == 2 * 9e9 * 3 / 4  # in each part
    expert, rest = 3 * 256 * 128, 256 * 128 * (4 + 2 + 2 + 4) + 256 * 8 + 3 * 256 * 256 + 2 * 256
    dense = 256 * 128 * (4 + 2 + 2 + 4) + 3 * 256 * 512 + 2 * 256
    shared = 1024 * 256 + 256 + 2 * dense
    active, tokens = 7 * (2 * expert + rest) + shared, BATCH * LENGTH
    seen = BATCH * LENGTH * (LENGTH + 1) // 2
    forward = 2 * active * tokens + 4 * 9 * 4 * 128 * seen
    assert plan.model_flops * 4 == pytest.approx(3 * forward, rel=1e-3)  # the biases of the routers
    assert plan.flops * 4 == pytest.approx(4 * forward, rel=1e-3)
    weights = 7 * (8 * expert + rest) + shared
    assert plan.state * 4 == pytest.approx(12 * weights, rel=1e-3)
    state, gradients = 12 * weights / 4, weights
    more = 2 * gradients - 3 * (8 * expert + rest)  # of layers that are not compiled, and the sum of both parts
    more += 6 * LENGTH * 256 * 2  # what goes into these
    assert plan.temporaries - GIB == pytest.approx(more, rel=0.06)  # held in whole MiB
    assert plan.moved == pytest.approx(2 * (3 * 2 * weights + 2 * gradients) + 2 * state + gradients, rel=0.01)
    text = report.describe_training("m", plan)
    assert "compiled: 3 of 9 layers, beside what the others hold" in text and "FITS: 14." in text
    found = report.training_object("m", plan)
    assert found["seconds"] == max(found[f"{name}_seconds"] for name in ("memory", "compute", "link"))


def test_the_smallest_slice(deep, compiler, monkeypatch):
    def refuse(lowerings):
        raise TooLarge("2 layers", "Used (99.00G) exceeds available HBM (15.75G)")

    real = training.compile_all
    monkeypatch.setattr(
        training, "compile_all", lambda low: (refuse if compiler[-1:] and len(compiler) <= 2 else real)(low)
    )
    plan = smallest_slice(RECIPE, deep, CHIPS["v5e"], None, quiet)
    assert len(compiler) == 4  # one chip was refused
    assert (plan.topology.name, plan.recipe.accumulate) == ("v5e:2x2", BATCH // 4)
    wide = dataclasses.replace(deep, hidden_size=65536, intermediate_size=131072)
    largest = smallest_slice(RECIPE, wide, CHIPS["v5e"], None, quiet)
    assert not largest.fits and largest.topology.devices == BATCH  # more chips than rows would do
    assert len(compiler) == 4
    plan = plan_training(RECIPE, wide, parse_topology("v5e:2x2"), None, None, quiet)
    assert not plan.fits and plan.temporaries is None
    assert "DOES NOT FIT" in report.describe_training("m", plan)


def test_bad_requests(deep):
    with pytest.raises(UserError, match="compiles for TPU slices, and NVIDIA H100 is none"):
        plan_training(RECIPE, deep, parse_topology("h100:8"), None, None, quiet)
    with pytest.raises(UserError, match="batch_size is 8: it must be a multiple of the 8 groups of fsdp"):
        plan_training(RECIPE, deep, parse_topology("v5e:2x4"), None, None, quiet)


def test_pairs_are_two_rows(deep, compiler):
    plan = plan_training(RECIPE, deep, parse_topology("v5e:2x2"), None, None, quiet)
    both = plan_training(PAIRS, deep, parse_topology("v5e:2x2"), None, None, quiet)
    assert both.tokens == 2 * plan.tokens and both.flops == 2 * plan.flops


def test_a_step_is_compiled_without_weights(small_config):
    """Of a dense model, quick to compile."""
    config = dataclasses.replace(small_config, model_type="ernie4_5", num_hidden_layers=1)
    recipe = dataclasses.replace(RECIPE, remat="none", lora_rank=8, lora_targets=["attention", "dense"])
    plan = plan_training(recipe, config, parse_topology("v5e:2x2"), None, None, quiet)
    assert plan.fits and plan.depths == (1,) and plan.temporaries > 0 and plan.roofline.sent > 0
    assert plan.flops == plan.model_flops
    assert "f32[8,1]" in Trainer(PAIRS, config, plan.layout).lower(0).as_text("hlo")  # what the reference says of pairs
