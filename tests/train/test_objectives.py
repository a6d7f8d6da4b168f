"""What a recipe minimises: each field acts as its function says, in parts and over devices too."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax.errors import UserError
from ernie_jax.model import Backends
from ernie_jax.ops import packed_attention
from ernie_jax.sharding import make_layout, single
from ernie_jax.train.data import IGNORED, PreferenceBatch
from ernie_jax.train.losses import summed_loss
from ernie_jax.train.mtp import predictions, shifted_targets
from ernie_jax.train.preference import answers, interleaved, preference_objective, preference_sums, sides
from ernie_jax.train.router_losses import load_balance_loss, orthogonality_loss, orthogonalized, z_loss
from ernie_jax.train.trainer import Trainer
from ernie_jax.train.weights import Weights

pytestmark = pytest.mark.usefixtures("quick_compiling")
ROUTER = "layers.1.mlp.router.weight"


@pytest.fixture(scope="module")
def ahead(config, started, tmp_path_factory, quick_compiling):
    """The config of a model that predicts two tokens more, and a recipe with every loss beside the next token's."""
    config = dataclasses.replace(config, num_nextn_predict_layers=2)
    directory = tmp_path_factory.mktemp("ahead")
    (directory / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    return config, dataclasses.replace(
        started, model=str(directory), checkpoint="", init_scale=0.1, accumulate=2, frozen=["*.correction_bias"],
        router_balance_weight=0.2, router_z_weight=0.3, router_orthogonality_weight=0.5, mtp_weight=0.7,
    )  # fmt: skip


def run_model(model, rows):
    def attend(q, k, v, cache):
        return packed_attention(q, k, v, rows.segments), cache

    return model(rows.tokens, rows.positions, attend, backends=Backends("dense")), attend


def next_token(model, hidden, targets):
    weight, bias = model.head_weights()
    return summed_loss(hidden.reshape(-1, hidden.shape[-1]), weight, bias, targets.reshape(-1))


def test_what_is_minimised_is_the_sum_of_what_is_asked_for(ahead, batch):
    config, recipe = ahead
    trainer = Trainer(recipe, config, single())
    state = trainer.initial_state()
    counts = [np.sum(np.asarray(shifted_targets(batch.targets, batch.segments, d)) != IGNORED) for d in (1, 2)]

    def expected(parameters):
        model = trainer.plan.bind(Weights(parameters, state.frozen))
        whole, attend = run_model(model, batch)
        depths = predictions(model, whole.hidden, batch.tokens, batch.positions, attend)
        found = {"loss": next_token(model, whole.hidden, batch.targets) / np.sum(batch.targets != IGNORED), "mtp": 0}
        for depth, (states, count) in enumerate(zip(depths, counts, strict=True), start=1):
            targets = shifted_targets(batch.targets, batch.segments, depth)
            found["mtp"] += next_token(model, states, targets) / count / 2
        found |= {"balance": 0, "z": 0, "orthogonality": orthogonality_loss(parameters[ROUTER])}
        probabilities, totals = (
            array.reshape(4, 32, -1) for array in (whole.routing[0].probabilities, whole.routing[0].log_total)
        )
        for part in range(2):  # whose means count alike
            real = jnp.ones(64, bool)
            found["balance"] += load_balance_loss(probabilities[part::2].reshape(64, -1), 2, real) / 2
            found["z"] += z_loss(totals[part::2].reshape(64), real) / 2
        weights = {"loss": 1, "mtp": 0.7, "balance": 0.2, "z": 0.3, "orthogonality": 0.5}
        return sum(weights[name] * value for name, value in found.items()), found

    pull, found = jax.jit(jax.grad(expected, has_aux=True))(state.parameters)
    counted = trainer._objective.counts(batch)
    gradients, sums = jax.jit(trainer._gradients)(state, batch, counted)
    assert {name for name in gradients if name.startswith("mtp.")}
    for name, value in gradients.items():
        np.testing.assert_allclose(value, pull[name], rtol=1e-3, atol=1e-5, err_msg=name)
    metrics = trainer._objective.metrics(sums.objective, counted) | trainer._routers.metrics(sums.routers)
    for name in ("balance", "z", "orthogonality"):
        np.testing.assert_allclose(metrics[f"router_{name}"], found[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(metrics["loss"], found["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["mtp_loss"], found["mtp"], rtol=1e-5)


def test_routers_are_made_orthogonal_after_the_optimiser(started, config, batch):
    recipe = dataclasses.replace(started, learning_rate=0.0, frozen=[], router_orthogonality_rate=2.0)
    trainer = Trainer(recipe, config, single())
    state = trainer.initial_state()
    before = jax.device_get(state.parameters)
    state, metrics = trainer.step(state, batch)
    for name, value in before.items():
        if name == ROUTER:
            assert np.abs(state.parameters[name] - value).max() > 1e-3
            value = orthogonalized(value, 2.0)
        if not name.endswith("correction_bias"):
            np.testing.assert_allclose(state.parameters[name], value, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(metrics["router_orthogonality"], orthogonality_loss(before[ROUTER]), rtol=1e-5)
    assert "router_balance" not in metrics and "router_z" not in metrics


@pytest.mark.parametrize(
    ("change", "dense", "message"),
    [
        ({"router_balance_weight": 1e-5}, True, "router_balance_weight: .* has no routers; leave it at 0"),
        (
            {"router_orthogonality_rate": 1e-3},
            False,
            "router_orthogonality_rate moves the routers' weights",
        ),
        ({"router_orthogonality_weight": 1.0, "lora_rank": 2}, False, "router_orthogonality_weight moves the routers'"),
        ({"mtp_weight": 0.3}, False, "mtp_weight: .* has no multi-token prediction; leave it at 0"),
    ],
)
def test_what_the_model_has_not_is_refused(started, config, change, dense, message):
    if dense:
        config = dataclasses.replace(config, model_type="ernie4_5")
    with pytest.raises(UserError, match=message):
        Trainer(dataclasses.replace(started, **change), config, single())


@pytest.fixture(scope="module")
def pairs(batch) -> PreferenceBatch:
    """Rows of two pairs each, but one that has none in its second place; the reference is drawn."""
    rng, shape = np.random.default_rng(4), (16, 32)

    def side():
        tokens = rng.integers(3, 320, shape).astype(np.int32)
        positions, segments = (np.resize(some, shape) for some in (batch.positions, batch.segments))
        targets = np.where((positions < 5) | (positions == 15), IGNORED, np.roll(tokens, -1, 1))
        segments[3, 16:], targets[3, 16:] = -1, IGNORED
        return type(batch)(tokens, positions, segments, targets)

    numbers = np.arange(32, dtype=np.int32).reshape(16, 2)
    numbers[3, 1] = -1
    reference = tuple(rng.normal(-60, 4, numbers.shape).astype(np.float32) for _ in range(2))
    return PreferenceBatch(side(), side(), numbers, reference)


@pytest.fixture(scope="module")
def preferring(started):
    options = {"beta": 0.5, "sft_weight": 0.25}
    return dataclasses.replace(started, batch_size=16, warmup_steps=1, expert_backend="batched", preference=options)


def three_steps(recipe, config, pairs, layout):
    """Return the trainer, the metrics of each step, and the state after them."""
    trainer = Trainer(recipe, config, layout)
    state, metrics = trainer.initial_state(), []
    placed = trainer.place(pairs)
    for _ in range(3):
        state, values = trainer.step(state, placed)
        metrics.append(jax.device_get(values))
    return trainer, metrics, state


@pytest.fixture(scope="module")
def alone(preferring, config, pairs):
    return three_steps(preferring, config, pairs, single())


def test_a_step_on_pairs_minimises_what_its_functions_say(preferring, config, pairs, alone):
    trainer, metrics, state = alone
    held = trainer.evaluate(state, [pairs])
    model = trainer.bind(trainer.initial_state())
    rows = interleaved(pairs.chosen, pairs.rejected)
    logits = jax.jit(lambda model: model.logits(run_model(model, rows)[0].hidden))(model)
    targets = jnp.where(rows.targets == IGNORED, 0, rows.targets)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    chosen, rejected = sides(answers(logprobs, rows.targets, rows.segments, 2))
    options, real = preferring.preference_options, pairs.pairs >= 0
    sums = preference_sums(options, chosen, rejected, pairs.reference, real)
    expected = preference_objective(options, sums, 31, np.sum(pairs.chosen.targets != IGNORED))
    np.testing.assert_allclose(metrics[0]["train_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["train_chosen_logprob"], chosen.logprobs[real].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["train_rejected_logprob"], rejected.logprobs[real].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["train_reward_accuracy"], sums.correct / 31, rtol=1e-6)
    margin = (sums.chosen_reward - sums.rejected_reward) / 31
    np.testing.assert_allclose(metrics[0]["train_reward_margin"], margin, rtol=1e-4, atol=1e-4)
    assert held["loss"] < metrics[0]["train_loss"] and held["reward_margin"] > margin


def test_steps_on_pairs_are_the_same_in_parts_over_eight_devices(preferring, config, pairs, alone):
    layout = make_layout(config, jax.devices(), preset="expert")
    _, metrics, state = three_steps(dataclasses.replace(preferring, accumulate=2), config, pairs, layout)
    _, others, whole = alone
    for one, other in zip(metrics, others, strict=True):
        for name, value in other.items():
            np.testing.assert_allclose(one[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    for name, value in whole.parameters.items():
        np.testing.assert_allclose(state.parameters[name], value, atol=1e-4, err_msg=name)
