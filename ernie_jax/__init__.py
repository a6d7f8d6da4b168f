"""ERNIE 4.5 in JAX: convert once, then generate, serve and fine-tune with one sharded model.

    llm = ernie_jax.load("checkpoints/ernie-4.5-21b")
    llm.generate(["The capital of France is"], ernie_jax.SamplingParams(max_new_tokens=32))

For logits, `llm.logits(token_ids)`, or the bare model: `ernie_jax.forward(llm.model, tokens)`.
"""

from __future__ import annotations

from ernie_jax.config import ModelConfig
from ernie_jax.engine import SamplingParams
from ernie_jax.errors import UserError
from ernie_jax.llm import LLM, Completion, Score
from ernie_jax.model import Ernie, forward
from ernie_jax.version import VERSION

__version__ = VERSION
__all__ = ["LLM", "Completion", "Ernie", "ModelConfig", "SamplingParams", "Score", "UserError", "forward", "load"]

load = LLM.load
