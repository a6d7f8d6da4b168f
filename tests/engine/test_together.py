"""An engine that follows another has on its devices what the other has, though it is told no token."""

import gc
import queue

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax.channel import Frame
from ernie_jax.engine import Engine, EngineOptions, SamplingParams
from ernie_jax.model import Ernie, initialize
from ernie_jax.sharding import make_layout, single

PAGE = 16
OPTIONS = EngineOptions(cache_tokens=8 * PAGE, max_sequences=4, prefill_chunk=32, mixed_chunk=16, page_size=PAGE)


class Pipe:
    """Both ends of a channel; arrays can't be written to, as those that come over the network."""

    def __init__(self):
        self.frames, self.words, self.bytes = queue.SimpleQueue(), [], []

    def send(self, word, fact=None, arrays=()):
        arrays = [array.copy() for array in arrays]
        for array in arrays:
            array.flags.writeable = False
        self.words.append(word)
        self.bytes.append(sum(array.nbytes for array in arrays))
        self.frames.put(Frame(word, fact, arrays))

    def receive(self):
        return self.frames.get(timeout=60)


@pytest.fixture
def engines(tiny_model):
    leader, follower = (
        Engine(tiny_model, single(), OPTIONS, valid_vocab=300, stop_ids=frozenset({2})) for _ in range(2)
    )
    follower._devices.step = leader._devices.step  # compiled once
    follower._devices.sampler._step = leader._devices.sampler._step
    return leader, follower


class Even:
    """A toy grammar: even tokens."""

    free = finished = False

    def mask(self, out):
        out[:] = 0x55555555

    def accept(self, token):
        return token % 2 == 0


def drain(engine):
    events = []
    while engine.has_work:
        events += engine.step()
    return events


def check_equal(leader, follower):
    devices = (engine._devices for engine in (leader, follower))
    ours, theirs = ((each.pages, each.sampler.last_tokens, each.sampler._state) for each in devices)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), ours, theirs)
    assert any(np.asarray(page).any() for page in ours[0])


def test_a_follower_has_the_same_on_its_devices(engines, rng):
    leader, follower = engines
    follower.submit([5] * 20, SamplingParams(max_new_tokens=3))  # of the time before, when each had its own
    drain(follower)
    pipe = Pipe()
    with leader.lead(pipe):
        settings = [
            SamplingParams(max_new_tokens=70, temperature=0.0, ignore_eos=True),
            SamplingParams(max_new_tokens=70, temperature=1.3, top_p=0.9, ignore_eos=True),
            SamplingParams(max_new_tokens=20, temperature=0.7, top_p=0.9, seed=2**64 - 1, logit_bias={7: 3.5, 9: -1.5}),
            SamplingParams(max_new_tokens=10, temperature=0.0, repetition_penalty=1.3, logprobs=True, stop=("x",)),
        ]
        for index, params in enumerate(settings):  # the features grow while others run
            grammar = Even() if index == 1 else None
            leader.submit(rng.integers(3, 300, 16 + index).tolist(), params, grammar=grammar)
            for _ in range(3):
                leader.step()
        drain(leader)
        shown = leader.logits([3, 4, 5])
        leader.freeze()
        gc.unfreeze()
        leader.submit([5] * 40, SamplingParams(max_new_tokens=4, temperature=0.0))
        drain(leader)
    assert leader.stats().preemptions > 0
    assert {"reset", "forward", "sample", "set", "lay_out", "freeze", "logits", "end"} == set(pipe.words)
    assert gc.get_freeze_count() == 0
    follower.follow(pipe)
    assert gc.get_freeze_count() > 100_000
    gc.unfreeze()
    assert pipe.frames.empty() and shown.shape == (3, 320)
    check_equal(leader, follower)


def test_a_follower_begins_anew_with_the_leader(engines, rng):
    leader, follower = engines
    pipe = Pipe()
    with leader.lead(pipe):
        params = SamplingParams(max_new_tokens=8, temperature=0.0, presence_penalty=1.0)
        leader.submit(rng.integers(3, 300, 40).tolist(), params)
        leader.step()
        leader.reset()
        leader.submit(rng.integers(3, 300, 40).tolist(), params)
        drain(leader)
    follower.follow(pipe)
    check_equal(leader, follower)


def test_experts_that_data_groups_tell_each_other(tiny_config, rng):
    """Where groups exchange tokens only all processes together can say which experts the rows have."""
    layout = make_layout(tiny_config, jax.devices()[:2], "expert:2", "exchange")
    model = Ernie(tiny_config, jnp.float32)
    initialize(model, layout)
    leader, follower = (Engine(model, layout, OPTIONS) for _ in range(2))
    pipe = Pipe()
    with leader.lead(pipe):
        params = SamplingParams(max_new_tokens=5, temperature=0.0, ignore_eos=True)
        leader.submit(rng.integers(3, 300, 20).tolist(), params)
        drain(leader)
        assert "experts" not in pipe.words
        leader.submit(rng.integers(3, 300, 20).tolist(), params, include_routing=True)
        assert all(event.experts.shape == (2, 2) for event in drain(leader))
        assert pipe.words.count("experts") == 5
    follower.follow(pipe)
    np.testing.assert_array_equal(*(engine._devices.experts() for engine in (leader, follower)))


def test_steps_that_follow_are_small(engines, rng):
    """A step of unchanged sequences needs nothing but the word; a mask only the rows that have one."""
    leader, _ = engines
    pipe = Pipe()
    with leader.lead(pipe):
        leader.submit([5] * 10, SamplingParams(max_new_tokens=60, temperature=0.0, ignore_eos=True))
        drain(leader)
        steps = [size for word, size in zip(pipe.words, pipe.bytes, strict=True) if word in ("forward", "sample")]
        assert len(steps) >= 120 and sum(size > 0 for size in steps) < 10
        leader.submit([5] * 10, SamplingParams(max_new_tokens=20, temperature=0.0), grammar=Even())
        for _ in range(3):
            leader.submit([5] * 10, SamplingParams(max_new_tokens=20, temperature=0.0, ignore_eos=True))
        before = len(pipe.words)
        drain(leader)
        masks = [size for word, size in zip(pipe.words, pipe.bytes, strict=True) if word == "sample"]
    assert max(masks[-20:]) == 4 + 4 + 320 // 8 and before < len(pipe.words)
