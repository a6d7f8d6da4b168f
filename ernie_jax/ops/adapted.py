"""Weights with a low-rank adapter beside them, not added up: of a frozen weight only the adapter learns."""

from __future__ import annotations

import dataclasses

import jax

from ernie_jax.ops.quantized import Quantized


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A weight [*out, *in] and what is added to it, up x down: [*out, rank] x [rank, *in].

    Stacked weights have an adapter each: then the first axis of the outputs is also that of `down`.
    """

    weight: jax.Array | Quantized
    down: jax.Array
    up: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def size(self) -> int:
        return self.weight.size

    @property
    def dtype(self):
        return self.weight.dtype

    def __getitem__(self, index) -> Adapted:
        """Index the axis of a stack."""
        return Adapted(self.weight[index], self.down[index], self.up[index])

    def as_matrix(self, inner: int) -> Adapted:
        """Return it as [outputs, inner]; not of a stack."""
        base = self.weight.as_matrix(inner) if isinstance(self.weight, Quantized) else self.weight.reshape(-1, inner)
        return Adapted(base, self.down.reshape(-1, inner), self.up.reshape(-1, self.up.shape[-1]))

    def low_rank(self, subscripts: str) -> tuple[str, str]:
        """Split the subscripts x, weight -> out of a product into x, down -> between and between, up -> out."""
        inputs, output = subscripts.split("->")
        x, weight = inputs.split(",")
        inner = "".join(label for label in weight if label not in output)
        outer = weight.removesuffix(inner)
        stack = outer[: self.down.ndim - 1 - len(inner)]
        # The stack first: XLA on CPUs multiplies bfloat16 with a float32 result in that order only.
        between = "".join(dict.fromkeys(label for label in stack + x if label not in inner)) + "Z"
        return f"{x},{stack}Z{inner}->{between}", f"{between},{outer}Z->{output}"
