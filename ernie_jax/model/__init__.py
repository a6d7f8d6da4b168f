"""The ERNIE 4.5 decoder as Flax NNX modules."""

from ernie_jax.model.layers import Routing
from ernie_jax.model.transformer import Ernie, ModelOutput, forward, initialize, parameter_specs

__all__ = ["Ernie", "ModelOutput", "Routing", "forward", "initialize", "parameter_specs"]
