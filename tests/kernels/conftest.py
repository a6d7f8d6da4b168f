"""The tests here run in the emulator."""

import os

import pytest

from tests.emulator import emulated, problem


@pytest.fixture
def emulator():
    """Run kernels in the emulator, their threads in an order of their own."""
    if reason := problem():
        pytest.skip(reason)
    seed = int(os.environ.get("ERNIE_EMULATOR_SEED") or int.from_bytes(os.urandom(4), "little"))
    print("ERNIE_EMULATOR_SEED", seed)
    with emulated(seed=seed):
        yield
