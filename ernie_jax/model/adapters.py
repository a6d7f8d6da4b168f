"""Low-rank adapters (LoRA): which linear layers have one, of which shape, and how it is added to a weight."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from ernie_jax.errors import UserError
from ernie_jax.lora import TARGETS, LoRA
from ernie_jax.model.layers import Linear, MoE, parameter
from ernie_jax.model.transformer import Ernie

DOWN, UP = "lora_a", "lora_b"  # names of the parameters


def targeted(model: Ernie, targets: Sequence[str]) -> Iterator[tuple[str, Linear]]:
    """Yield the dotted path of each linear layer that some targets name, and the layer."""
    for index, layer in enumerate(model.layers):
        parts = {"attention": (("attention.qkv", layer.attention.qkv), ("attention.out", layer.attention.out))}
        mlps = {"dense": ("mlp", layer.mlp)}
        if isinstance(layer.mlp, MoE):
            mlps = {"routed": ("mlp.experts", layer.mlp.experts)}
            if hasattr(layer.mlp, "shared"):
                mlps["shared"] = ("mlp.shared", layer.mlp.shared)
        for target, (path, mlp) in mlps.items():
            parts[target] = ((f"{path}.gate_up", mlp.gate_up), (f"{path}.down", mlp.down))
        for target in TARGETS:
            if target in targets:
                for path, linear in parts.get(target, ()):
                    yield f"layers.{index}.{path}", linear


def declare(model: Ernie, lora: LoRA, dtype: jnp.dtype) -> None:
    """Give the linear layers that are named abstract adapters; their b is to be filled in scaled.

    Raises:
      UserError: if the model has none of the layers that are named.
    """
    linears = list(targeted(model, lora.targets))
    if not linears:
        raise UserError(f"recipe field lora_targets is {', '.join(lora.targets)}: the model has no such layers")
    for _, linear in linears:
        down, up = axes(linear)
        shape = linear.read(lambda leaf: leaf.get_value()).shape
        sizes = dict(zip(linear.weight.get_metadata("axes"), shape, strict=True))
        sizes["rank"] = lora.rank
        linear.lora_a = parameter(tuple(map(sizes.get, down)), down, dtype)
        linear.lora_b = parameter(tuple(map(sizes.get, up)), up, dtype)


def axes(linear: Linear) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the logical axes of a linear layer's a and b."""
    weight = linear.weight.get_metadata("axes")
    outer = len(weight) - linear.inputs
    stack = weight[: int(weight[0] == "expert")]
    return (*stack, "rank", *weight[outer:]), (*weight[:outer], "rank")


def draw(name: str, abstract: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
    """Draw what a new adapter's parameter is: b zero, a uniform with the usual spread of a linear layer's weight."""
    if name.endswith(UP):
        return jax.jit(lambda: jnp.zeros(abstract.shape, abstract.dtype), out_shardings=abstract.sharding)()
    inputs = math.prod(abstract.shape[2 if ".experts." in name else 1 :])
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return _drawer(abstract.shape, abstract.dtype, abstract.sharding)(key, inputs**-0.5)


@functools.cache
def _drawer(shape, dtype, sharding):
    def uniform(key, bound):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return jax.jit(uniform, out_shardings=sharding)


def add(weight: jax.Array, down: jax.Array, up: jax.Array) -> jax.Array:
    """Add a scaled adapter to a weight in float32, and round once to the weight's dtype."""
    outer = up.ndim - 1
    inner = weight.ndim - outer
    out, into = "abcd"[:outer], "wxyz"[:inner]
    stack = out[: down.ndim - 1 - inner]
    wide = up.astype(jnp.float32), down.astype(jnp.float32)
    more = jnp.einsum(f"{out}r,{stack}r{into}->{out}{into}", *wide, precision=jax.lax.Precision.HIGHEST)
    return (weight.astype(jnp.float32) + more).astype(weight.dtype)
