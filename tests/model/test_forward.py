"""The bare model as a function."""

import jax
import jax.numpy as jnp
import numpy as np

from ernie_jax.model import forward


def test_a_second_call_outside_of_jit_compiles_nothing(tiny_model):
    compiled = []

    def listen(event, seconds, **more):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    tokens = jnp.arange(23)[None]  # a length that no other test has compiled
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        first = forward(tiny_model, tokens)
        assert compiled
        compiled.clear()
        again = forward(tiny_model, tokens)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(jax.jit(forward)(tiny_model, tokens), first, atol=1e-5)
