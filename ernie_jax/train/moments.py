"""AdamW's moments in 8 bits between steps.

A number is stored as a power of a ratio, times the largest of its row (the last axis): 127 powers and a sign for first
moments, 255 powers for second ones, which therefore span 2^-16 and 2^-42 of the largest. Of the two powers that a
number lies between, it becomes one by chance, such that it is right on average: rounded to the nearest, a second moment
that changes by less than half a power a step would never change.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

_SIGNED = 127, 8.0  # powers, and how many of them double a number
_POSITIVE = 255, 6.0


class Packed(NamedTuple):
    """Numbers in 8 bits: powers int8 or uint8, and the largest of each row, float32 [..., 1]."""

    powers: jax.Array
    largest: jax.Array


class Moments(NamedTuple):
    """Both moments of parameters by name, packed, after `count` steps."""

    count: jax.Array
    mu: dict[str, Packed]
    nu: dict[str, Packed]


def zeros(values: dict[str, jax.Array]) -> Moments:
    """Return the moments of parameters before the first step."""

    def empty(dtype):
        return {
            name: Packed(jnp.zeros(value.shape, dtype), jnp.zeros((*value.shape[:-1], 1), jnp.float32))
            for name, value in values.items()
        }

    return Moments(jnp.zeros([], jnp.int32), empty(jnp.int8), empty(jnp.uint8))


def pack(count: jax.Array, mu: dict[str, jax.Array], nu: dict[str, jax.Array]) -> Moments:
    """Pack float32 moments; what chance decides depends on the step and the parameter's name alone."""
    first, second = {}, {}
    for name, value in mu.items():
        bits = _bits(count, name, value.shape)
        low, high = ((half & 0xFFFF).astype(jnp.float32) / (1 << 16) for half in (bits, bits >> 16))
        first[name], second[name] = pack_signed(value, low), pack_positive(nu[name], high)
    return Moments(count, first, second)


def _bits(count: jax.Array, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Return random bits of each place, uint32; JAX's own take twenty times the work."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    start = jnp.uint32(zlib.crc32(name.encode())) + count.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    return _mixed(place ^ _mixed(start))


def _mixed(x: jax.Array) -> jax.Array:
    """Source: lowbias32 of Chris Wellons' hash-prospector."""
    x = (x ^ x >> 16) * jnp.uint32(0x7FEB352D)
    x = (x ^ x >> 15) * jnp.uint32(0x846CA68B)
    return x ^ x >> 16


def pack_signed(x: jax.Array, chance: jax.Array) -> Packed:
    """Pack numbers of either sign; those that are too small become zero.

    Args:
      chance: of each, from 0 to below 1, evenly.
    """
    power, largest = _power(jnp.abs(x), chance, *_SIGNED)
    return Packed((jnp.sign(x) * jnp.maximum(power, 0)).astype(jnp.int8), largest)


def pack_positive(x: jax.Array, chance: jax.Array) -> Packed:
    """Pack numbers from 0 up; too small ones become the smallest, as they are divided by."""
    power, largest = _power(x, chance, *_POSITIVE)
    return Packed(jnp.where(x > 0, jnp.maximum(power, 1), 0).astype(jnp.uint8), largest)


def unpack(packed: Packed) -> jax.Array:
    """Return the float32 numbers."""
    powers, per_octave = _SIGNED if packed.powers.dtype == jnp.int8 else _POSITIVE
    power = packed.powers.astype(jnp.float32)
    size = packed.largest * jnp.exp2((jnp.abs(power) - powers) / per_octave)
    return jnp.where(power == 0, 0.0, jnp.sign(power) * size)


def _power(x, chance, powers, per_octave):
    largest = jnp.max(x, axis=-1, keepdims=True)
    exact = powers + per_octave * jnp.log2(x / jnp.where(largest > 0, largest, 1.0))
    below = jnp.floor(exact)
    share = (jnp.exp2((exact - below) / per_octave) - 1) / (2 ** (1 / per_octave) - 1)  # of the way to the next power
    return jnp.where(x > 0, jnp.minimum(below + (chance < share), powers), 0.0), largest
