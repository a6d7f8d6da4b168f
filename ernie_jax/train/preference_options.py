"""What is learnt from pairs of answers: which loss, and its numbers."""

from __future__ import annotations

import dataclasses

from ernie_jax.errors import UserError
from ernie_jax.train.fields import check_fields

VARIANTS = ("sigmoid", "hinge", "ipo", "simpo", "dpop")


@dataclasses.dataclass(frozen=True)
class PreferenceOptions:
    """Say what is minimised.

    Attributes:
      variant: one of VARIANTS.
      beta: how much a log-probability counts that moves away from the reference.
      label_smoothing: how often the pairs are thought to be the wrong way round; of sigmoid and simpo.
      normalize_lengths: bring the sums of log-probabilities of a pair's answers to their mean length; ipo and simpo
        take means per token instead.
      simpo_margin: by how much simpo wants the chosen answer ahead.
      dpop_weight: what dpop multiplies a loss of probability of the chosen answer by.
      preference_weight, sft_weight: of the preference loss, and of the chosen answers' cross-entropy beside it.

    Raises:
      UserError: naming the field, if a value is out of range.
    """

    variant: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    normalize_lengths: bool = True
    simpo_margin: float = 0.5
    dpop_weight: float = 50.0
    preference_weight: float = 1.0
    sft_weight: float = 0.0

    def __post_init__(self):
        check_fields(self, "recipe field preference.")
        if self.variant not in VARIANTS:
            raise UserError(f"recipe field preference.variant is {self.variant!r}: choose one of {', '.join(VARIANTS)}")
        if not self.beta:
            raise UserError("recipe field preference.beta is 0: it must be above 0")
        smoothing = self.label_smoothing
        if smoothing >= 0.5:
            raise UserError(f"recipe field preference.label_smoothing is {smoothing}: it must be from 0 to below 0.5")
        if smoothing and self.variant not in ("sigmoid", "simpo"):
            raise UserError(
                f"recipe field preference.label_smoothing is for sigmoid and simpo, not {self.variant}: leave it at 0"
            )

    @property
    def needs_reference(self) -> bool:
        """Tell whether log-probabilities of a reference model take part."""
        return self.variant != "simpo"
