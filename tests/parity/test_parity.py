"""Hold the model and the engine to what transformers computes from the same checkpoint.

In float32: every half layer, routing, the logits of whole prompts and of the paged engine, greedy continuations. In
bfloat16: every half layer from transformers' own input to it, and the log-probabilities of the paged engine. Of some
cases also the gradients of a training loss, in float32.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from ernie_jax.config import ModelConfig
from ernie_jax.engine import Engine, EngineOptions, SamplingParams
from ernie_jax.engine.batching import unpack
from ernie_jax.model import Backends, layers
from ernie_jax.ops import packed_attention
from ernie_jax.train.losses import summed_loss

FLOAT32 = 1e-4  # absolute; logits and hidden states are of the order of 1 to 10
GRADIENT = 1e-4  # relative, of the norm of a weight's gradient

# Both programs round a half layer's intermediates to bfloat16 at the same places, by errors of a similar size that add
# like independent ones: our distance from the exact result is that of torch, give or take the chance of 500 values and
# more, some hundredths. One more rounding beside n others makes it sqrt((n + 1) / n): 1.41 for n = 1.
BFLOAT16_RATIO = 1.3


@jax.jit
def run_layers(model, tokens, positions, segments, given=None):
    """Compute the states that write_fixtures.py names, each from the one before.

    Args:
      tokens, positions, segments: [1, T] int32, packed.
      given: states [1, T, D] to start each half layer from, instead of this model's own.

    Returns:
      (states by name, [1, T, D]; "logits" too, Routing of each MoE layer).
    """
    angles = layers.rotary_angles(positions, model.config)
    states, routing = {}, []

    def keep(name, value):
        states[name] = value
        return given[name] if given else value

    def attend(q, k, v, _):
        return packed_attention(q, k, v, segments), None

    x = keep("embed", model.embed(tokens))
    for i, layer in enumerate(model.layers):
        x = keep(f"layer_{i}.attention", x + layer.attention(layer.input_norm(x), angles, attend, None)[0])
        h = layer.post_attention_norm(x)
        if isinstance(layer.mlp, layers.MoE):
            h, routed = layer.mlp(h)
            routing.append(routed)
        else:
            h = layer.mlp(h)
        x = keep(f"layer_{i}", x + h)
    states["logits"] = model.logits(keep("norm", model.norm(x)))
    return states, routing


def pack(runs: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay sequences end to end: tokens, positions and segments, [1, T] each."""
    tokens = np.concatenate(runs)[None]
    positions = np.concatenate([np.arange(len(run)) for run in runs])[None]
    segments = np.repeat(np.arange(len(runs)), [len(run) for run in runs])[None]
    return tokens, positions, segments


def assert_states_close(ours: dict, reference: dict, tolerance: float):
    """Compare states in the order of computation, so that the first wrong half layer is the one named."""
    for name, expected in reference.items():
        worst = np.max(np.abs(ours[name] - expected))
        assert worst <= tolerance, f"{describe(name)}: max |difference| {worst:.2e} exceeds {tolerance:.0e}"


def describe(state: str) -> str:
    layer, _, half = state.removeprefix("layer_").partition(".")
    if not state.startswith("layer_"):
        return {"embed": "embedding", "norm": "final norm"}.get(state, state)
    return f"layer {layer} after {half or 'its MLP'}"


def chosen_sets(experts: np.ndarray) -> np.ndarray:
    return np.sort(experts, axis=-1)


@pytest.fixture(scope="session")
def whole_prompts(case, float32_model):
    """States and routing of all sequences of a case, packed into one row, and where each sequence lies."""
    runs = [s.tokens[:-1] for s in case.sequences]
    states, routing = jax.device_get(run_layers(float32_model, *pack(runs)))
    ends = np.cumsum([len(run) for run in runs])
    places = [slice(end - len(run), end) for run, end in zip(runs, ends, strict=True)]
    return {name: x[0] for name, x in states.items()}, routing, places


def test_float32_states_layer_by_layer(case, whole_prompts):
    states, _, places = whole_prompts
    start = places[int(case.arrays["detailed"])].start
    prompt = slice(start, start + case.detailed.length)
    assert_states_close({n: x[prompt] for n, x in states.items()}, case.states("float32"), FLOAT32)


def test_rotary_frequencies(case):
    """At position 131,071 a difference of one float32 step (1.2e-7) turns a head by up to a hundredth of a radian."""
    config = ModelConfig.from_file(case.source / "config.json")
    ours = layers.rotary_angles(np.ones(1, np.int32), config)[0]
    np.testing.assert_array_equal(ours, case.arrays["inverse_frequencies"])


def test_float32_logits_of_whole_prompts(case, whole_prompts):
    states, _, places = whole_prompts
    for sequence, place in zip(case.sequences, places, strict=True):
        assert_states_close({"logits": states["logits"][place]}, {"logits": sequence.logits}, FLOAT32)


def test_float32_routing(case, whole_prompts):
    _, routing, places = whole_prompts
    for sequence, place in zip(case.sequences, places, strict=True):
        for layer, (routed, expected) in enumerate(zip(routing, sequence.experts, strict=True)):
            wrong = np.argwhere((chosen_sets(routed.experts[place]) != chosen_sets(expected)).any(-1)).ravel()
            assert not wrong.size, f"MoE layer {layer}: other experts than transformers at positions {wrong.tolist()}"
    start = places[int(case.arrays["detailed"])].start
    for routed, expected in zip(routing, case.arrays["routing_weights_float32"], strict=True):
        # By size: which of two chosen experts comes first, a float32 step between their biased scores may decide.
        weights = routed.weights[start : start + len(expected)]
        np.testing.assert_allclose(np.sort(weights), np.sort(expected), atol=FLOAT32 / 10)


def test_bfloat16_half_layers(case, bfloat16_model):
    """Start every half layer from transformers' bfloat16 input, so that errors neither add up nor cancel."""
    theirs, exact = case.states("bfloat16"), case.states("exact")
    inputs = {name: value[None] for name, value in theirs.items()}
    states, routing = jax.device_get(run_layers(bfloat16_model, *pack([case.detailed.prompt]), inputs))
    ours = {name: value[0] for name, value in states.items()}
    for name, truth in exact.items():
        error, their_error = (np.linalg.norm(x[name].astype(np.float32) - truth) for x in (ours, theirs))
        assert error <= BFLOAT16_RATIO * their_error, (
            f"{describe(name)}: error {error:.2e} exceeds {BFLOAT16_RATIO} times {their_error:.2e} of transformers"
        )
    routed = [(r.experts, r.weights) for r in routing]
    expected = zip(case.arrays["experts_bfloat16"], case.arrays["routing_weights_bfloat16"], strict=True)
    for layer, ((experts, weights), (their_experts, their_weights)) in enumerate(zip(routed, expected, strict=True)):
        np.testing.assert_array_equal(chosen_sets(experts), chosen_sets(their_experts), f"MoE layer {layer}")
        assert_same_bits(f"MoE layer {layer}: weights", np.sort(weights), np.sort(their_weights))
    for name in ("embed", "norm"):
        assert_same_bits(describe(name), ours[name], theirs[name])


def assert_same_bits(what: str, ours: np.ndarray, theirs: np.ndarray):
    """Compare values that are float32 until their last roundings: another order of casts changes a quarter of them."""
    equal = np.mean(ours == theirs)
    assert equal > 0.85, f"{what}: only {equal:.0%} of the bfloat16 values are equal"


class RecordingStep:
    """Stand between an engine and its device step, and keep the logits of each row's last token."""

    def __init__(self, step):
        self._step = step
        self._logits: dict[tuple[int, int], np.ndarray] = {}  # (the sequence's first page, position) -> [V]

    def __getattr__(self, name):
        return getattr(self._step, name)

    def forward(self, pages, last_tokens, packed, shape):
        batch = unpack(np.array(packed)[0], shape).batch(shape)  # a copy: the step donates it
        outputs, pages = self._step.forward(pages, last_tokens, packed, shape)
        rows = np.flatnonzero(batch.kv_lengths)
        for row, values in zip(rows, np.asarray(outputs.logits), strict=False):
            place = int(batch.page_table[row, 0]), int(batch.kv_lengths[row] - 1)
            self._logits[place] = values
        return outputs, pages

    def logits_of(self, prompt: int) -> dict[int, np.ndarray]:
        """Return position -> logits [V] of the prompt submitted as number `prompt`."""
        first_page = sorted({page for page, _ in self._logits})[prompt]  # pages are handed out in order
        return {position: values for (page, position), values in self._logits.items() if page == first_page}


def generate(model, mesh, case) -> tuple[list[list[int]], RecordingStep]:
    """Continue all prompts of a case at once, greedily, through prefill chunks and the paged cache."""
    options = EngineOptions(cache_tokens=512, max_sequences=4, prefill_chunk=16, page_size=16, prefix_caching=False)
    engine = Engine(model, mesh, options)
    engine._devices.step = step = RecordingStep(engine._step)
    params = SamplingParams(temperature=0, max_new_tokens=len(case.detailed.continuation), ignore_eos=True)
    requests = [engine.submit(sequence.prompt, params) for sequence in case.sequences]
    generated = {request: [] for request in requests}
    while engine.has_work:
        for event in engine.step():
            generated[event.request].append(event.token)
    return [generated[request] for request in requests], step


def test_float32_engine(case, float32_model, mesh):
    generated, step = generate(float32_model, mesh, case)
    for i, sequence in enumerate(case.sequences):
        logits = step.logits_of(i)
        assert set(logits) >= set(range(sequence.length - 1, len(sequence.tokens) - 1))
        for position, ours in sorted(logits.items()):
            worst = np.max(np.abs(ours - sequence.logits[position]))
            assert worst <= FLOAT32, f"prompt {i}, position {position}: max |difference| of logits {worst:.2e}"
        assert generated[i] == sequence.continuation


@pytest.mark.cases("gradients")
def test_float32_gradients(case, float32_model, gradients):
    """Differentiate the mean loss of the next token over all sequences, packed into one row, by every weight."""
    inputs = pack([sequence.tokens[:-1] for sequence in case.sequences])
    targets = np.concatenate([sequence.tokens[1:] for sequence in case.sequences])

    @functools.partial(jax.jit, static_argnums=0)
    def differentiate(experts, model, tokens, positions, segments):
        def attend(q, k, v, cache):
            return packed_attention(q, k, v, segments), cache

        def mean_loss(model):
            hidden = model(tokens, positions, attend, backends=Backends(experts)).hidden[0]
            return summed_loss(hidden, *model.head_weights(), targets) / len(targets)

        return jax.grad(mean_loss)(model)

    theirs = nnx.to_flat_state(nnx.state(gradients))
    for experts in ("dense", "blocks") if float32_model.config.is_moe else ("dense",):
        ours = nnx.to_flat_state(nnx.state(differentiate(experts, float32_model, *inputs)))
        for (path, mine), (_, expected) in zip(ours, theirs, strict=True):
            name = ".".join(map(str, path))
            assert_gradients_close(name, *(np.asarray(leaf.get_value()) for leaf in (mine, expected)))


def assert_gradients_close(name: str, ours: np.ndarray, theirs: np.ndarray):
    """Compare by norm; each expert is a matrix of its own, and the gradient of one that nobody chose is zero."""
    axes = tuple(range("experts" in name, ours.ndim))
    wrong = np.sqrt(((ours - theirs) ** 2).sum(axes)) > GRADIENT * np.sqrt((theirs**2).sum(axes))
    assert not wrong.any(), f"{name}: gradients differ by more than {GRADIENT:.0e} (of experts {np.flatnonzero(wrong)})"


@pytest.mark.cases("full_width")
def test_bfloat16_engine(case, bfloat16_model, mesh):
    """Where no leading token or expert is ahead by less than bfloat16 resolves, tokens are equal, too."""
    generated, step = generate(bfloat16_model, mesh, case)
    (sequence,) = case.sequences
    assert generated == [sequence.continuation]
    errors = [np.abs(ours.astype(np.float32) - sequence.logits[at]) for at, ours in step.logits_of(0).items()]
    assert np.median(errors) <= BFLOAT16_RATIO * case.arrays["bfloat16_logit_error"]


@pytest.mark.cases("small")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engine_scores(case, dtype, request, mesh):
    """Score every token of every sequence through the paged cache."""
    options = EngineOptions(cache_tokens=512, prefill_chunk=512, page_size=16)
    engine = Engine(request.getfixturevalue(f"{dtype}_model"), mesh, options)
    scores = dict(engine.score([sequence.tokens for sequence in case.sequences]))
    errors = []
    for i, sequence in enumerate(case.sequences):
        expected = np.asarray(jax.nn.log_softmax(sequence.logits))[np.arange(len(scores[i])), sequence.tokens[1:]]
        errors.append(np.abs(scores[i] - expected))
    errors = np.concatenate(errors)
    if dtype == "float32":
        assert errors.max() <= FLOAT32
    else:
        assert np.median(errors) <= BFLOAT16_RATIO * case.arrays["bfloat16_logprob_error"]
