"""The engine: scheduler, paged cache, jitted steps, sampling, and the loop that keeps the device busy."""

from ernie_jax.engine.engine import Engine, Grammar, Progress, Stats, TokenEvent
from ernie_jax.engine.options import EngineOptions
from ernie_jax.engine.sampling import SamplingParams

__all__ = ["Engine", "EngineOptions", "Grammar", "Progress", "SamplingParams", "Stats", "TokenEvent"]
