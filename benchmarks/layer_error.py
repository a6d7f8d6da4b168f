"""Measure how far quantised weights move the hidden states of a full-width model of random weights, layer by layer.

    python -m benchmarks.layer_error [--config=configs/ernie-4.5-21b-a3b.json] [--layers=2] [--tokens=64]

One layer is in memory at a time: of the 21B model that takes 5 GiB, and layers are drawn normal with standard deviation
0.02. All is computed in float32 on the default device. For each layer and form: the error of what the layer adds to the
exact hidden states, relative to that; and behind it the error of hidden states that came through quantised layers only,
relative to the exact ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ernie_jax.config import QUANTIZED_FORMS, ModelConfig
from ernie_jax.model.layers import ALL_ROWS, Backends, DecoderLayer, Linear, rotary_angles
from ernie_jax.ops import packed_attention, quantize
from ernie_jax.sharding import WHOLE

DEVIATION = 0.02
BACKENDS = Backends(experts="blocks")  # a few experts at a time are made float32


def draw(config: ModelConfig, index: int) -> DecoderLayer:
    """Draw the layer of an index; its matrices are bfloat16."""
    layer, rng = DecoderLayer(config, jnp.bfloat16, config.is_moe_layer(index)), np.random.default_rng(index)

    def fill(path, leaf):
        spec, init = leaf.get_value(), leaf.get_metadata("init")
        value = np.full(spec.shape, init == "ones", spec.dtype)
        if init == "normal":
            for part in value:  # so that they are not all held in float32
                part[...] = rng.standard_normal(part.shape, np.float32) * DEVIATION
        return path, leaf.replace(jnp.asarray(value))

    nnx.update(layer, nnx.from_flat_state([fill(*item) for item in nnx.to_flat_state(nnx.state(layer))]))
    return layer


def rounded(layer: DecoderLayer, config: ModelConfig, index: int) -> DecoderLayer:
    """Return a layer with its weights in the form that `config` says."""
    result = DecoderLayer(config, jnp.bfloat16, config.is_moe_layer(index))
    nnx.update(result, nnx.state(layer))
    for path, module in nnx.iter_modules(layer):
        if isinstance(module, Linear):
            weight = quantize(np.asarray(module.weight[...]), module.weight[...].ndim - module.inputs, config.quantize)
            target = functools.reduce(getattr, path, result)
            target.weight.set_value(jnp.asarray(weight.values))
            target.scale.set_value(jnp.asarray(weight.scales))
    return result


@jax.jit
def apply(layer: DecoderLayer, x: jax.Array, angles: jax.Array) -> jax.Array:
    def attend(q, k, v, cache):
        one = jnp.zeros((1, len(q)), jnp.int32)
        return packed_attention(q[None], k[None], v[None], one)[0], cache

    return layer(x, angles, attend, None, WHOLE, ALL_ROWS, BACKENDS)[0]


def distance(found: jax.Array, exact: jax.Array) -> float:
    return float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/ernie-4.5-21b-a3b.json")
    parser.add_argument("--layers", type=int, default=2, help="how many, from the first on")
    parser.add_argument("--tokens", type=int, default=64)
    flags = parser.parse_args()
    config = ModelConfig.from_file(flags.config)
    angles = rotary_angles(jnp.arange(flags.tokens), config)
    exact = jax.random.normal(jax.random.key(1 << 20), (flags.tokens, config.hidden_size)) * DEVIATION
    streams = dict.fromkeys(QUANTIZED_FORMS, exact)
    print(f"{jax.devices()[0].device_kind}, {flags.tokens} tokens\nlayer  form   added by it   so far", flush=True)
    for index in range(min(flags.layers, config.num_hidden_layers)):
        layer, before = draw(config, index), exact
        exact = apply(layer, before, angles)
        for form in QUANTIZED_FORMS:
            other = rounded(layer, dataclasses.replace(config, quantize=form), index)
            own = distance(apply(other, before, angles) - before, exact - before)
            streams[form] = apply(other, streams[form], angles)
            print(f"{index:5d}  {form:5s} {own:11.2%} {distance(streams[form], exact):9.2%}", flush=True)
            del other


if __name__ == "__main__":
    main()
