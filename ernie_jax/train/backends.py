"""What computes attention and experts of a training step, and what of that is kept for the gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from ernie_jax import checkpoint
from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.kernels import compiling_for
from ernie_jax.model import Backends
from ernie_jax.model.layers import Attend
from ernie_jax.ops import (
    DIFFERENTIABLE_EXPERT_BACKENDS,
    KEPT,
    PACKED_ATTENTION_BACKENDS,
    default_packed_backend,
    packed_attention,
    packed_problem,
    trained_experts_problem,
)
from ernie_jax.sharding import Layout
from ernie_jax.train.recipe import Recipe

_POLICIES = jax.checkpoint_policies
_KERNELS = _POLICIES.save_only_these_names(*KEPT)
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda layer: layer,
    "products": functools.partial(
        jax.checkpoint, policy=_POLICIES.save_from_both_policies(_POLICIES.dots_with_no_batch_dims_saveable, _KERNELS)
    ),
    "kernels": functools.partial(jax.checkpoint, policy=_KERNELS),
    "attention": functools.partial(jax.checkpoint, policy=_POLICIES.save_only_these_names(KEPT.attention)),
    "layers": jax.checkpoint,
}


class StepBackends:
    """The backends of a recipe's steps on a layout.

    Attributes:
      attention: a name of ops.PACKED_ATTENTION_BACKENDS.
      others: of the layers.

    Raises:
      UserError: if the recipe names an unknown one, or one that does not take the model, the recipe or the device.
    """

    def __init__(self, recipe: Recipe, config: ModelConfig, layout: Layout):
        self._layout = layout
        with compiling_for(layout.capability):
            self.attention = _choose_attention(recipe, config, layout)
            _check_experts(recipe, config, layout)
        self.others = Backends(recipe.expert_backend, linear="xla", platform=layout.platform, router="xla")

    def attend(self, segments: jax.Array) -> Attend:
        """Return what attends within rows; of several devices each has rows or heads of its own."""

        def attend(q, k, v, segments):
            return packed_attention(q, k, v, segments, self.attention)

        layout = self._layout
        if self.attention != "xla" and layout.mesh.size > 1:
            heads = layout.spec(("group", None, "kv_head"))
            specs = heads, heads, heads, layout.spec(("group", None))
            # The gradient of its own that a backend brings knows nothing of what varies over which axes.
            attend = jax.shard_map(attend, mesh=layout.mesh, in_specs=specs, out_specs=heads, check_vma=False)
        return lambda q, k, v, cache: (attend(q, k, v, segments), cache)


def _choose_attention(recipe: Recipe, config: ModelConfig, layout: Layout) -> str:
    heads = config.head_dim, checkpoint.parse_dtype(recipe.dtype), recipe.sequence_length
    backend = recipe.attention_backend or default_packed_backend(layout.platform, *heads)
    if backend not in PACKED_ATTENTION_BACKENDS:
        raise UserError(f"recipe field attention_backend must be one of {', '.join(PACKED_ATTENTION_BACKENDS)}")
    if problem := packed_problem(backend, *heads):
        raise UserError(f"recipe field attention_backend: {backend} {problem}; use xla")
    return backend


def _check_experts(recipe: Recipe, config: ModelConfig, layout: Layout) -> None:
    backend = recipe.expert_backend
    if backend not in DIFFERENTIABLE_EXPERT_BACKENDS:
        raise UserError(f"recipe field expert_backend must be one of {', '.join(DIFFERENTIABLE_EXPERT_BACKENDS)}")
    if not config.is_moe:
        return
    sizes = config.hidden_size, config.moe_intermediate_size // layout.size("expert_mlp")
    dtype = config.quantize or checkpoint.parse_dtype(recipe.dtype)
    if problem := trained_experts_problem(backend, *sizes, dtype):
        raise UserError(f"recipe field expert_backend: {backend} {problem}; use batched")
