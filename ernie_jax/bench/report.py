"""A measurement for people: the header, a line a case, the largest kernels."""

from __future__ import annotations

from ernie_jax.bench.machine import Machine
from ernie_jax.bench.measure import Case, Row
from ernie_jax.bench.profile import Profile

_LARGEST = 10
_NAME = 60  # characters of a kernel's name
HEADER = (
    f"{'':<20}{'ms':>9}{'tok/s':>9}{'GB':>9}{'GFLOP':>10}{'floor ms':>10}{'of floor':>10}{'bound':>9}"
    f"{'compile s':>11}  ops"
)


def name(case: Case) -> str:
    """Name a case: sequences x tokens of each."""
    return f"{case.kind} {case.batch} x {case.context}"


def describe_machine(machine: Machine) -> str:
    """Say what a device can do."""
    return (
        f"a device here: copy {machine.copy / 1e12:.3g} TB/s read + written, read {machine.read / 1e12:.3g} TB/s, "
        f"bfloat16 matmul {machine.matmul / 1e12:.3g} TFLOP/s"
    )


def line(row: Row) -> str:
    """Return a row of the table under HEADER."""
    return (
        f"{name(row.case):<20}{row.seconds * 1e3:>9.2f}{row.tokens_per_second:>9,.0f}{row.moved / 1e9:>9.3g}"
        f"{row.flops / 1e9:>10,.1f}{row.floor * 1e3:>10.2f}{row.of_floor:>10.1%}{row.bound:>9}"
        f"{row.compile_seconds:>11.1f}  {row.ops}"
    )


def largest(found: Profile) -> list[str]:
    """Return a line for each of the kernels that take most."""
    count, share = sum(kernel.count for kernel in found.kernels), found.busy / (found.span or 1)
    lines = [f"  {found.busy * 1e3:.2f} ms in {count:,} kernels, {share:.1%} of {found.span * 1e3:.2f}; the largest:"]
    for kernel in found.kernels[:_LARGEST]:
        scope = f" ({kernel.scope})" if kernel.scope else ""
        numbers = f"{kernel.count:>8,} x {kernel.seconds * 1e6:>12,.0f} us {kernel.share:>6.1%}"
        lines.append(f"  {numbers}  {kernel.name[:_NAME]}{scope}")
    return lines
