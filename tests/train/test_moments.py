"""Moments in 8 bits: how far they are from what was stored, and that they are right on average."""

import jax
import jax.numpy as jnp
import numpy as np

from ernie_jax.train import moments


def test_numbers_are_within_a_power_and_right_on_average(rng):
    x = (rng.choice([-1, 1], (4, 64)) * 10 ** rng.uniform(-4, 0, (4, 64))).astype(np.float32)
    chances = rng.random((400, *x.shape), dtype=np.float32)
    for pack, values, ratio in (
        (moments.pack_signed, x, 2 ** (1 / 8)),
        (moments.pack_positive, x * x, 2 ** (1 / 6)),
    ):
        found = np.asarray(jax.vmap(lambda c, p=pack, v=values: moments.unpack(p(v, c)))(chances))
        assert (np.maximum(found / values, values / found) < ratio * 1.0001).all()
        np.testing.assert_allclose(found.mean(0), values, rtol=0.02)
        largest = np.abs(values).argmax(-1)[:, None]
        exact = np.take_along_axis(values, largest, -1)
        np.testing.assert_allclose(np.take_along_axis(found[0], largest, -1), exact, rtol=1e-6)


def test_chance_is_even_and_of_no_step_or_place_the_same():
    x = jnp.full((64, 64), 2 ** (-0.5 / 8)).at[:, 0].set(1.0)  # half a power below
    packed = [moments.pack(jnp.int32(step), {"a": x, "b": x}, {"a": x, "b": x}) for step in (1, 2)]
    draws = [one.mu[name].powers[:, 1:] == 127 for one in packed for name in "ab"]
    draws += [one.nu[name].powers[:, 1:] == 255 for one in packed for name in "ab"]
    for draw in draws[:4]:
        assert 0.44 < draw.mean() < 0.55
        assert (draw.mean(0) > 0.25).all() and (draw.mean(1) > 0.25).all()
    assert (abs(np.corrcoef([np.ravel(draw) for draw in draws]) - np.eye(8)) < 0.07).all()


def test_rows_of_zeros_and_numbers_out_of_range():
    x = jnp.array([[0.0, 0.0], [1.0, 1e-15], [1.0, 0.0]])
    chance = jnp.zeros_like(x)
    np.testing.assert_array_equal(moments.unpack(moments.pack_signed(x, chance)), [[0, 0], [1, 0], [1, 0]])
    found = moments.unpack(moments.pack_positive(x, chance))
    np.testing.assert_allclose(found, [[0, 0], [1, 2 ** (-254 / 6)], [1, 0]], rtol=1e-5)
    packed = moments.pack_signed(-x, chance)
    assert packed.powers.dtype == jnp.int8 and packed.powers[1, 0] == -127 and packed.largest.shape == (3, 1)


def test_a_second_moment_fades_although_a_step_changes_it_by_less_than_a_power(rng):
    value = jnp.ones((16, 512))  # so many that chance leaves their mean within 0.4 % (standard deviation)
    for chance in rng.random((50, 16, 512), dtype=np.float32):
        value = moments.unpack(moments.pack_positive((0.97 * value).at[:, 0].set(1.0), chance))
    assert np.isclose(float(value[:, 1:].mean()), 0.97**50, rtol=0.05)
