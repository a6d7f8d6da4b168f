"""ERNIE 4.5 in JAX: convert once, then generate, serve and fine-tune with one sharded model.

    llm = ernie_jax.load("checkpoints/ernie-4.5-21b")
    llm.generate(["The capital of France is"], ernie_jax.SamplingParams(max_new_tokens=32))

For logits, `llm.logits(token_ids)`, or the bare model: `ernie_jax.forward(llm.model, tokens)`, and
`ernie_jax.routing(llm.model, tokens)` for the experts that it chose.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ernie_jax.errors import UserError
from ernie_jax.version import VERSION

if TYPE_CHECKING:
    from ernie_jax.config import ModelConfig
    from ernie_jax.engine import SamplingParams
    from ernie_jax.llm import LLM, Completion, Score, load
    from ernie_jax.model import Ernie, forward, routing

__version__ = VERSION
__all__ = [
    "LLM",
    "Completion",
    "Ernie",
    "ModelConfig",
    "SamplingParams",
    "Score",
    "UserError",
    "forward",
    "load",
    "routing",
]

_HOMES = {
    "LLM": "llm",
    "Completion": "llm",
    "Score": "llm",
    "load": "llm",
    "ModelConfig": "config",
    "SamplingParams": "engine",
    "Ernie": "model",
    "forward": "model",
    "routing": "model",
}


def __getattr__(name: str) -> Any:
    """Import the module of a public name when the name is first used: `main.py help` needs no JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
