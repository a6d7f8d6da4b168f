"""The engine: scheduler, paged cache, jitted steps, sampling, and the loop that keeps the device busy."""

from ernie_jax.engine.engine import Engine
from ernie_jax.engine.events import FinishReason, Grammar, Progress, Stats, TokenEvent
from ernie_jax.engine.options import EngineOptions
from ernie_jax.engine.sampling import SamplingParams

__all__ = [
    "Engine",
    "EngineOptions",
    "FinishReason",
    "Grammar",
    "Progress",
    "SamplingParams",
    "Stats",
    "TokenEvent",
]
