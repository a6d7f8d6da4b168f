"""The trainer: it learns, balances experts, and goes on exactly where it was interrupted."""

import dataclasses
import json
import math
import shutil
import xml.etree.ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ernie_jax import checkpoint
from ernie_jax.errors import UserError
from ernie_jax.model import Backends
from ernie_jax.ops import packed_attention
from ernie_jax.sharding import make_layout, single
from ernie_jax.train import Recipe, run
from ernie_jax.train.data import IGNORED, Batch, TrainingData
from ernie_jax.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("quick_compiling")


@pytest.fixture
def recipe(tmp_path, config, counting, monkeypatch) -> Recipe:
    """A tiny model, relative paths."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    return Recipe(
        model="model", data=str(counting), sources={"counting": 1}, output="out",
        steps=6, batch_size=4, sequence_length=32, learning_rate=1e-2,
        init_scale=0.1, seed=3, log_every=1, evaluate_every=2, save_every=2,
    )  # fmt: skip


def parameters(output) -> dict[str, np.ndarray]:
    state = nnx.state(checkpoint.restore(f"{output}/checkpoint", single()))
    return {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(state)}


def logged(output) -> list[dict]:
    with open(f"{output}/metrics.jsonl") as file:
        rows = map(json.loads, file)
        return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


def test_training_learns_and_writes_what_it_promises(recipe):
    recipe = dataclasses.replace(recipe, steps=60)
    loss = run(recipe, progress=False)["counting"]["loss"]
    assert math.exp(loss) < 40  # 320 before training
    rows = logged("out")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert loss == rows[-1]["counting_loss"]
    assert "counting_loss" not in rows[0] and "expert_load" not in rows[0]
    assert np.sum(rows[-1]["expert_load"]) == 4 * 32 * 2  # of one layer
    assert 0 < rows[-1]["router_entropy"] < math.log(8) and rows[-1]["dead_experts"] >= 0
    assert rows[-1]["bias_drift"] > 0
    xml.etree.ElementTree.parse("out/curve.svg")
    found = parameters("out")
    assert found["embed.weight"].dtype == jnp.bfloat16
    assert found["layers.1.mlp.router.weight"].dtype == np.float32
    bias = found["layers.1.mlp.router.correction_bias"]
    steps = bias / recipe.bias_update_rate
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-2)
    assert bias.any()
    with pytest.raises(UserError, match="this run is finished"):
        run(recipe, progress=False)


def test_an_interrupted_run_continues_bit_by_bit(recipe, tmp_path, monkeypatch):
    recipe = dataclasses.replace(recipe, moment_dtype="int8")
    run(recipe, progress=False)
    shutil.copytree(recipe.data, tmp_path / "copy")
    interrupted = dataclasses.replace(recipe, output="interrupted", data=str(tmp_path / "copy"))
    read = TrainingData.batch

    def break_off(data, step):
        if step == 5:  # after step 5 of 6; the last save was after step 4
            raise KeyboardInterrupt
        return read(data, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingData, "batch", break_off)
        run(interrupted, progress=False)
    with pytest.raises(UserError, match="other values of seed"):
        run(dataclasses.replace(interrupted, seed=4), progress=False)
    file = tmp_path / "copy" / "counting.train.npy"
    tokens = np.load(file)
    np.save(file, np.roll(tokens, 13))
    with pytest.raises(UserError, match="copy/counting.train.npy changed since step 4's checkpoint"):
        run(interrupted, progress=False)
    np.save(file, tokens)

    steps = []
    monkeypatch.setattr(TrainingData, "batch", lambda data, step: steps.append(step) or read(data, step))
    run(interrupted, progress=False)
    assert steps == [4, 5]
    whole, resumed = parameters("out"), parameters("interrupted")
    for name, value in whole.items():
        np.testing.assert_array_equal(value, resumed[name], err_msg=name)
    assert logged("out") == logged("interrupted")


def test_a_step_moves_biases_by_the_routers_usage_alone(recipe, config):
    recipe = dataclasses.replace(recipe, dtype="float32")
    trainer = Trainer(recipe, config, single())
    state = trainer.initial_state()
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 320, (4, 32)).astype(np.int32)
    positions = np.broadcast_to(np.arange(32, dtype=np.int32), (4, 32))
    batch = Batch(tokens, positions, np.zeros_like(tokens), np.roll(tokens, -1, 1))
    model = trainer.bind(state)

    def attend(q, k, v, cache):
        return packed_attention(q, k, v, batch.segments), cache

    out = model(tokens, positions, attend, backends=Backends("dense"))
    (routing,) = out.routing
    usage = np.bincount(np.asarray(routing.experts).reshape(-1), minlength=8)
    state, _ = trainer.step(state, batch)
    bias = np.asarray(state.parameters["layers.1.mlp.router.correction_bias"])
    np.testing.assert_allclose(bias, 1e-3 * np.sign(usage.mean() - usage), atol=1e-9)


@pytest.fixture(scope="module")
def wide(started, quick_compiling):
    """A recipe with rows for 8 groups."""
    # Adam with its usual epsilon makes a whole step of the rounding noise in a gradient that should be zero.
    return dataclasses.replace(started, batch_size=8, steps=20, warmup_steps=1, expert_backend="batched", frozen=[])


def twenty_steps(recipe, config, layout):
    """Return each step's loss on a batch of its own, and the parameters after them."""
    rng = np.random.default_rng(2)
    positions = np.broadcast_to(np.arange(32, dtype=np.int32), (8, 32))
    trainer, losses = Trainer(recipe, config, layout), []
    state = trainer.initial_state()
    for _ in range(20):
        tokens = rng.integers(3, 320, (8, 32)).astype(np.int32)
        batch = Batch(tokens, positions, np.zeros_like(tokens), np.roll(tokens, -1, 1))
        state, metrics = trainer.step(state, trainer.place(batch))
        losses.append(metrics["train_loss"])
    return np.array(losses), state


@pytest.fixture(scope="module")
def alone(wide, config):
    losses, state = twenty_steps(wide, config, single())
    return losses, jax.device_get(state.parameters)


@pytest.mark.parametrize("preset", ["fsdp", "expert", "expert+tensor", "expert+data", "exchange", "tensor"])
def test_steps_are_the_same_in_every_layout(wide, alone, config, preset):
    layout = make_layout(config, jax.devices(), preset=preset)
    losses, state = twenty_steps(wide, config, layout)
    expected_losses, expected = alone
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for name, value in expected.items():
        np.testing.assert_allclose(state.parameters[name], value, atol=1e-5, err_msg=name)
    shape = (layout.mesh.devices.size, len(state.parameters["embed.weight"].addressable_shards[0].data))
    assert shape == (8, 320 if preset == "fsdp" else 40)


@pytest.fixture(scope="module")
def stepped(started, config, batch, quick_compiling):
    """State and metrics after one step, without any of what tests change."""
    return one_step(started, config, batch)


def one_step(recipe, config, batch, layout=None):
    trainer = Trainer(recipe, config, layout or single())
    state, metrics = trainer.step(trainer.initial_state(), trainer.place(batch))
    return jax.device_get((state, metrics))


def test_a_checkpoint_goes_on_learning_with_its_routers_as_they_are(started, config, batch):
    before = nnx.state(checkpoint.restore(started.checkpoint, single()))
    before = {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(before)}
    state, _ = one_step(dataclasses.replace(started, dtype="bfloat16"), config, batch)
    assert set(state.frozen) == {f"layers.1.mlp.router.{name}" for name in ("weight", "correction_bias")}
    for name, value in state.frozen.items():
        np.testing.assert_array_equal(value, before[name])
    assert set(state.parameters) | set(state.frozen) == set(before)
    for name, value in state.parameters.items():
        assert value.dtype == np.float32 and (value != before[name]).any(), name
    some = Trainer(dataclasses.replace(started, frozen=["*.correction_bias", "embed.*"]), config, single())
    assert set(before) - some.plan.trained == {"layers.1.mlp.router.correction_bias", "embed.weight"}
    with pytest.raises(UserError, match="leaves no parameter"):
        Trainer(dataclasses.replace(started, frozen=["*"]), config, single())


@pytest.mark.parametrize("change", [{"remat": "layers", "accumulate": 4}, {"remat": "products"}])
def test_parts_and_recomputation_change_nothing_but_rounding(started, stepped, config, batch, change):
    state, metrics = stepped
    other, values = one_step(dataclasses.replace(started, **change), config, batch)
    for name, value in metrics.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-4, err_msg=name)
    for name, value in state.parameters.items():
        np.testing.assert_allclose(other.parameters[name], value, atol=1e-5, err_msg=name)


def test_token_balanced_gradients_count_all_places(started, stepped, config, batch):
    _, metrics = stepped
    _, balanced = one_step(dataclasses.replace(started, token_balanced=True), config, batch)
    learnt = (batch.targets != IGNORED).mean()
    assert math.isclose(balanced["train_loss"], metrics["train_loss"], rel_tol=1e-6)
    assert math.isclose(balanced["gradient_norm"], metrics["gradient_norm"] * learnt, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("stored", "dtypes"), [("bfloat16", {"int32", "bfloat16"}), ("int8", {"int32", "int8", "uint8", "float32"})]
)
def test_moments_are_stored_in_less(started, stepped, config, batch, stored, dtypes):
    state, _ = stepped
    narrow, _ = one_step(dataclasses.replace(started, moment_dtype=stored), config, batch)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(narrow.optimizer)} == dtypes
    for name, value in state.parameters.items():
        np.testing.assert_array_equal(narrow.parameters[name], value)  # the first step reads no stored moments


@pytest.mark.parametrize(("preset", "stored"), [("expert", "float32"), ("fsdp", "int8")])
def test_the_abstract_state_is_that_of_the_real_one(started, config, preset, stored):
    recipe = dataclasses.replace(started, batch_size=8, moment_dtype=stored)
    trainer = Trainer(recipe, config, make_layout(config, jax.devices(), preset=preset))
    abstract, state = trainer.abstract_state(), trainer.initial_state()
    described = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), abstract)
    assert described == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)


def test_batches_divide_over_the_groups(recipe, config):
    layout = make_layout(config, jax.devices(), preset="fsdp")
    with pytest.raises(UserError, match="batch_size is 4: it must be a multiple of the 8 groups of fsdp"):
        Trainer(dataclasses.replace(recipe, batch_size=4), config, layout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float8"}, "float8"),
        ({"expert_backend": "fast"}, "expert_backend must be one of"),
        ({"expert_backend": "gmm"}, "expert_backend must be one of"),  # it has no gradient
        ({"expert_backend": "mosaic"}, "expert_backend: mosaic .*; use batched"),
        ({"attention_backend": "rpa"}, "attention_backend must be one of xla, mosaic, splash"),
        ({"attention_backend": "splash"}, "attention_backend: splash takes heads of 128, not of .*; use xla"),
        ({"sources": {"absent": 1}}, "absent.train.npy: no such file"),
        ({"model": "nowhere"}, "recipe field model is nowhere: no such directory"),
        ({"sequence_length": 4096}, "sequence_length is 4096"),
        ({"learning_rate": 1e30}, "make learning_rate smaller"),
    ],
)
def test_bad_recipes(recipe, change, message):
    with pytest.raises(UserError, match=message):
        run(dataclasses.replace(recipe, **change), progress=False)
