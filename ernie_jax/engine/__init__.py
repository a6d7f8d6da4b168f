"""The engine: paged cache, jitted steps, sampling, and the loop that keeps the device busy."""

from ernie_jax.engine.engine import Engine, EngineOptions, TokenEvent
from ernie_jax.engine.sampling import SamplingParams

__all__ = ["Engine", "EngineOptions", "SamplingParams", "TokenEvent"]
