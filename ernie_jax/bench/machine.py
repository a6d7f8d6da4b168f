"""What one device can do, measured: the roofline that steps are held against."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates of a device.

    Attributes:
      copy: bytes read plus written per second by a copy.
      read: bytes per second by a sum.
      matmul: operations per second of a square bfloat16 product.
    """

    copy: float
    read: float
    matmul: float

    def floor(self, moved: float, flops: float) -> tuple[float, str]:
        """Return the least seconds for bytes and operations that overlap perfectly, and which of the two decides.

        Bytes go at the rate of a copy, the figure that is known of most machines.
        """
        return max((moved / self.copy, "memory"), (flops / self.matmul, "compute"))


def measure_machine(device: jax.Device) -> Machine:
    """Time a copy, a sum and a product on a device; about a second."""
    small = device.platform == "cpu"
    rows, side, times = (1 << 10, 1 << 9, 4) if small else (1 << 14, 1 << 13, 20)
    with jax.default_device(device):
        x = jnp.ones((rows, 1 << 14), jnp.float32)  # 64 MiB or 1 GiB: beyond any cache
        copy = _seconds(_Copy(x), times=times)
        read = _seconds(jax.jit(lambda x: x.sum(1)), x, times=times)
        # Random: zeros cost less power, and so run at a higher clock.
        a, b = jax.random.normal(jax.random.key(0), (2, side, side), jnp.bfloat16)
        product = _seconds(jax.jit(jnp.matmul), a, b, times=times)
    return Machine(2 * x.nbytes / copy, x.nbytes / read, 2 * side**3 / product)


class _Copy:
    """Copy an array into one that is already there: new memory would cost a CPU more than the copy."""

    def __init__(self, source: jax.Array):
        self._source, self._target = source, source + 1
        self._run = jax.jit(lambda source, target: source + 1, donate_argnums=1, keep_unused=True)

    def __call__(self) -> jax.Array:
        self._target = self._run(self._source, self._target)
        return self._target


def process_age() -> float:
    """Return the seconds since this process started; where the system does not say, its processor time."""
    stat, uptime = pathlib.Path("/proc/self/stat"), pathlib.Path("/proc/uptime")
    if not stat.exists():
        return time.process_time()
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    return float(uptime.read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def _seconds(function: Callable, *args: jax.Array, times: int) -> float:
    """Return the seconds of a call, dispatched `times` in a row; median of a few rounds."""
    function(*args).block_until_ready()
    rounds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        for _ in range(times):
            out = function(*args)
        out.block_until_ready()
        rounds.append((time.perf_counter() - start) / times)
    return statistics.median(rounds)
