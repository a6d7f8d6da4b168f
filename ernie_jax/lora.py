"""What low-rank adapters (LoRA) are, said without JAX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from ernie_jax.errors import UserError

TARGETS = ("attention", "dense", "shared", "routed")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Describe adapters: a weight W [*out, *in] becomes W + scale * b a, with a [rank, *in] and b [*out, rank].

    Fused weights (queries, keys and values; gate and up) share an a; every routed expert has its own.

    Attributes:
      rank_stabilised: scale = alpha / sqrt(rank) instead of alpha / rank.
      targets: names of TARGETS: attention, dense MLPs, the shared experts, the routed experts.

    Raises:
      UserError: naming the recipe's field, if a value is out of range.
    """

    rank: int
    alpha: float
    rank_stabilised: bool = False
    targets: Sequence[str] = TARGETS

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"recipe field lora_rank is {self.rank}: it must be at least 1")
        if unknown := [name for name in self.targets if name not in TARGETS]:
            raise UserError(f"recipe field lora_targets has {', '.join(unknown)}; known are {', '.join(TARGETS)}")
        if not self.targets:
            raise UserError(f"recipe field lora_targets is empty; known are {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)
