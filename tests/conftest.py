"""Every test runs on 8 virtual CPU devices, unless JAX_PLATFORMS names another platform (tests/gpu/run.sh)."""

import os
import pathlib
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax.config import ModelConfig
from ernie_jax.model import Ernie, initialize
from ernie_jax.sharding import single


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Fresh numbers every run; the seed is printed when a test fails, and ERNIE_TEST_SEED gives it again."""
    seed = int(os.environ.get("ERNIE_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> pathlib.Path:
    """A new folder for converted models and compiled programs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def quick_compiling(cache) -> Iterator[None]:
    """Compile three times as fast, optimizing little, and keep every program in `cache`; subprocesses too.

    Of a module and not of the session: a worker runs modules of all folders in any order.
    """
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_compilation_cache_dir": str(cache / "compiled"),
    }
    before = {name: jax.config.values[name] for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERNIE_JAX_CACHE", str(cache))
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    return ModelConfig(
        "ernie4_5_moe",
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        moe_num_experts=8,
        moe_k=2,
        moe_intermediate_size=32,
        moe_num_shared_experts=2,
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config) -> Ernie:
    """A float32 model with random weights large enough that greedy choices are far apart."""
    model = Ernie(tiny_config, jnp.float32)
    initialize(model, single(), seed=3, scale=0.1)
    return model
