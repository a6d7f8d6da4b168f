"""The emulator finds what a GPU would punish: kernels with one mistake each (tests/emulator/broken.cu)."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax import kernels
from tests import emulator

pytestmark = pytest.mark.skipif(emulator.problem() is not None, reason=emulator.problem() or "")

SOURCE = pathlib.Path(emulator.__file__).parent / "broken.cu"
NUMBERS = {
    name: number
    for number, name in enumerate(re.findall(r"k\w+", re.search(r"enum Mistake {(.*?)}", SOURCE.read_text(), re.S)[1]))
}
FOUND = {
    "kNoBarrier": "(race: .* of static shared memory|which nobody has written)",
    "kNoBarrierBeforeReuse": "race: (reads|writes) byte .* of static shared memory",
    "kNoSyncwarp": "race: (reads|writes) byte .* of dynamic shared memory",
    "kNoWait": "reads .* while a copy to there by thread .* is under way",
    "kWaitForTooFew": "reads .* while a copy to there by thread .* is under way",
    "kNoBarrierAfterWait": "(race: reads .* which thread .* wrote|reads .* under way|which nobody has written)",
    "kSourceChanges": "the source of a copy has changed before wait_for_copies",
    "kUnwritten": "thread 4: reads byte .* of static shared memory, which nobody has written",
    "kIndexOutOfBounds": r"index [67]\d out of an array's bounds",
    "kDynamicOutOfBounds": "thread 63: writes 4 bytes from byte 256 of dynamic shared memory, which has 256",
    "kGlobalOutOfBounds": r"reads 4 bytes outside all buffers, at \d+ of argument 0, which has 1024",
    "kWritesArgument": "writes argument 0, which is not its to write",
    "kMisaligned": "an address that is not aligned as its type",
    "kLanesMissing": r"a shuffle from lane \d+, which takes no part",
    "kOtherBarrier": "divergence: .* at __syncthreads",
    "kWarpAtOtherPlace": r"divergence: this lane is at __shfl_sync \(broken.cu:\d+\), others .* at __shfl_sync",
    "kDeadlock": r"deadlock: .* threads 7 wait at __syncthreads \(broken.cu:\d+\)",
    "kMmaDiverges": "(mma without some lanes|divergence|deadlock)",
    "kNoBarrierAfterAtomic": "race: ",
    "kEarlyTouchesOutput": "writes result 0 before wait_for_previous",
    "kEarlyNeverWaits": "(before wait_for_previous|returns without wait_for_previous)",
    "kReliesOnHasty": "relies on the wait of the kernel before, which let this one start before it had waited",
    "kNoClusterBarrier": "(race: .* of the cluster|which nobody has written)",
    "kMapsTooEarly": "before any barrier of the cluster",
    "kTooMuchShared": "are more than there are",
}


def run(mistake, order="shuffled", seed=None):
    x = jnp.arange(256, dtype=jnp.float32) + 1
    with emulator.emulated(order, seed, sources=[SOURCE]):
        out = kernels.call("ernie_broken", jax.ShapeDtypeStruct(x.shape, x.dtype), x, mistake=NUMBERS[mistake])
        return np.asarray(x), np.asarray(out)


@pytest.mark.parametrize("order", ["shuffled", "forward", "backward"])
def test_without_a_mistake(order):
    x, out = run("kNone", order)
    np.testing.assert_array_equal(out.reshape(4, 64), np.roll(x.reshape(4, 64), -1, axis=1))


@pytest.mark.parametrize("mistake", FOUND)
def test_finds(mistake):
    with pytest.raises(jax.errors.JaxRuntimeError, match=FOUND[mistake]) as error:
        run(mistake)
    if mistake != "kTooMuchShared":  # that one does not start
        assert re.search(r"broken: (broken|cluster)_kernel, block \(\d, 0, 0\), thread \d+: ", str(error.value))
        assert re.search(r"\[seed \d+\]", str(error.value))


@pytest.mark.parametrize("mistake", [name for name in FOUND if name != "kTooMuchShared"])
@pytest.mark.parametrize("order", ["forward", "backward"])
def test_finds_it_in_any_order(mistake, order):
    with pytest.raises(jax.errors.JaxRuntimeError):
        run(mistake, order)


def test_seed_repeats_what_happened():
    messages = []
    for _ in range(2):
        with pytest.raises(jax.errors.JaxRuntimeError) as error:
            run("kNoBarrier", seed=12345)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_results_that_nobody_writes_are_nan():
    _, out = run("kUninitialisedOutput")
    assert np.isnan(out).all()


def test_works_after_a_failure():
    with pytest.raises(jax.errors.JaxRuntimeError):
        run("kDeadlock")
    test_without_a_mistake("shuffled")
