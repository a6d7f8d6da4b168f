"""How an Engine is sized, and which kernels it runs."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from ernie_jax.engine.cache import PAGE_SIZE, parse_kv_dtype
from ernie_jax.errors import UserError
from ernie_jax.ops import (
    ATTENTION_BACKENDS,
    EXCHANGE_BACKENDS,
    EXPERT_BACKENDS,
    HALVES,
    LINEAR_BACKENDS,
    ROUTER_BACKENDS,
)

_BACKENDS = {
    "expert": EXPERT_BACKENDS,
    "attention": ATTENTION_BACKENDS,
    "exchange": EXCHANGE_BACKENDS,
    "linear": LINEAR_BACKENDS,
    "router": ROUTER_BACKENDS,
    "halves": HALVES,
}
# Kernels for one kind of chip; the other backends run everywhere.
_PLATFORMS = {"rpa": ("tpu",), "gmm": ("tpu",), "ragged": ("tpu", "gpu"), "cuda": ("gpu",), "mosaic": ("gpu",)}
# On a GPU, long chunks keep the grouped products busy: 591 TFLOP/s at 8,192 tokens, 407 at 2,048 (H200).
# On a TPU, XLA's scatter of 2,048 tokens changes the layout of the whole cache; that of 512 does not.
_PREFILL_CHUNKS = {"gpu": 8192, "tpu": 512, "cpu": 512}
# What a stream waits for beside a long prompt: on a GPU some 35 ms of the 21B model instead of 10.
_MIXED_CHUNKS = {"gpu": 2048, "tpu": 256, "cpu": 128}


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Size an Engine.

    Attributes:
      cache_tokens: tokens that the KV cache holds over all sequences; None takes what fits in the device's memory.
      max_sequences: sequences decoded at the same time.
      prefill_chunk: most prompt tokens of a step; None takes 8192 on a GPU, else 512.
      mixed_chunk: the same while sequences are decoding, which then wait for them; None takes 2048 on a GPU, 256 on a
        TPU, 128 on a CPU; never more than prefill_chunk.
      page_size: tokens of a cache page.
      kv_dtype: of the cache: bfloat16, int8 with a scale for each token and head, or fp8 (e4m3); None: the model's.
      prefix_caching: keep the pages of earlier sequences for prompts that begin alike.
      expert_backend: a name of ops.EXPERT_BACKENDS; None chooses by platform and number of tokens.
      attention_backend: a name of ops.ATTENTION_BACKENDS; None chooses by platform.
      exchange_backend: a name of ops.EXCHANGE_BACKENDS; None chooses by platform.
      linear_backend: a name of ops.LINEAR_BACKENDS; None chooses by platform and shape.
      router_backend: a name of ops.ROUTER_BACKENDS; None chooses by platform and shape.
      halves_backend: a name of ops.HALVES; None chooses by platform, unless a backend of a part is asked for.
    """

    cache_tokens: int | None = None
    max_sequences: int = 64
    prefill_chunk: int | None = None
    mixed_chunk: int | None = None
    page_size: int = PAGE_SIZE
    kv_dtype: str | None = None
    prefix_caching: bool = True
    expert_backend: str | None = None
    attention_backend: str | None = None
    exchange_backend: str | None = None
    linear_backend: str | None = None
    router_backend: str | None = None
    halves_backend: str | None = None

    def __post_init__(self):
        for name in ("cache_tokens", "max_sequences", "prefill_chunk", "mixed_chunk", "page_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
        parse_kv_dtype(self.kv_dtype, jnp.bfloat16)
        for op, backends in _BACKENDS.items():
            backend = getattr(self, f"{op}_backend")
            if backend not in (None, *backends):
                raise UserError(f"ops: no {op} backend {backend!r}; choose one of {', '.join(backends)}")

    @property
    def backends(self) -> dict[str, str | None]:
        """The backends by the names of their fields."""
        return {f"{op}_backend": getattr(self, f"{op}_backend") for op in _BACKENDS}

    def on(self, platform: str) -> EngineOptions:
        """Return these options with the platform's choice for the chunks.

        Raises:
          UserError: if a backend does not run there.
        """
        for backend in self.backends.values():
            if platform not in _PLATFORMS.get(backend, (platform,)):
                raise UserError(f"ops: backend {backend} does not run on a {platform}; leave it out")
        prefill = self.prefill_chunk or default_prefill_chunk(platform)
        mixed = min(self.mixed_chunk or _MIXED_CHUNKS[platform], prefill)
        return dataclasses.replace(self, prefill_chunk=prefill, mixed_chunk=mixed)


def default_prefill_chunk(platform: str) -> int:
    """Return how many prompt tokens a step takes at most."""
    return _PREFILL_CHUNKS[platform]
