"""The ERNIE 4.5 decoder as Flax NNX modules."""

from ernie_jax.model.layers import Backends, GroupRows, Routing
from ernie_jax.model.transformer import (
    Ernie,
    ModelOutput,
    abstract_model,
    forward,
    initialize,
    parameter_specs,
    routing,
)

__all__ = [
    "Backends",
    "Ernie",
    "GroupRows",
    "ModelOutput",
    "Routing",
    "abstract_model",
    "forward",
    "initialize",
    "parameter_specs",
    "routing",
]
