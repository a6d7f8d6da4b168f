"""The tests here run in the emulator."""

import pytest

from tests.emulator import emulated, problem


@pytest.fixture
def emulator():
    """Run kernels in the emulator, their threads in an order of their own."""
    if reason := problem():
        pytest.skip(reason)
    with emulated():
        yield
