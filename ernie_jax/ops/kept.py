"""What policies of `jax.checkpoint` call that from which our kernels compute their gradients."""

from __future__ import annotations

from typing import NamedTuple


class Kept(NamedTuple):
    """Names of what each op keeps, unless it is computed again."""

    attention: str = "attention"
    experts: str = "experts"


KEPT = Kept()
