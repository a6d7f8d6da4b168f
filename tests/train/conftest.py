"""A tiny model and data that every training test can afford."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax import checkpoint
from ernie_jax.config import ModelConfig
from ernie_jax.model import Ernie, initialize
from ernie_jax.sharding import single
from ernie_jax.train import Recipe
from ernie_jax.train.data import IGNORED, Batch

END = 2


@pytest.fixture(scope="session")
def config(tiny_config) -> ModelConfig:
    """One dense and one MoE layer, quick to compile."""
    return dataclasses.replace(tiny_config, num_hidden_layers=2, moe_layer_end_index=-1)


@pytest.fixture(scope="session")
def counting(tmp_path_factory) -> pathlib.Path:
    """Data with a pattern to learn: each document counts upwards."""
    directory = tmp_path_factory.mktemp("data")
    for split, starts in (("train", range(3, 300)), ("heldout", range(8, 300, 50))):
        tokens = [[*range(start, start + 12), END] for start in starts]
        np.save(directory / f"counting.{split}.npy", np.concatenate(tokens).astype(np.uint16))
    return directory


@pytest.fixture(scope="session")
def batch() -> Batch:
    """Four rows of two documents each, some targets of which are not learnt."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, 320, (4, 32)).astype(np.int32)
    positions = np.broadcast_to(np.arange(32, dtype=np.int32) % 16, (4, 32))
    segments = np.broadcast_to(np.arange(32, dtype=np.int32) // 16, (4, 32))
    targets = np.where(rng.random((4, 32)) < 0.3, IGNORED, np.roll(tokens, -1, 1))
    return Batch(tokens, positions, segments, targets)


@pytest.fixture(scope="session")
def started(config, counting, tmp_path_factory) -> Recipe:
    """A recipe that starts from a converted checkpoint, float32 and a large epsilon to see little of rounding."""
    start = tmp_path_factory.mktemp("started") / "start"
    model = Ernie(config, jnp.float32)
    initialize(model, single(), seed=5, scale=0.1)
    checkpoint.save(start, model, {"config.json": json.dumps(dataclasses.asdict(config)).encode()}, "test")
    return Recipe(
        checkpoint=str(start), data=str(counting), sources={"counting": 1}, output="out",
        steps=6, batch_size=4, sequence_length=32, learning_rate=1e-2, dtype="float32", adam_epsilon=1e-3,
    )  # fmt: skip
