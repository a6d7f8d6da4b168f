"""The roll call, values that travel, and how a process's end becomes everybody's."""

import contextlib
import json
import pathlib
import socket
import time

import pytest

from ernie_jax import distributed, team
from ernie_jax.errors import UserError

WORKER = pathlib.Path(__file__).parent / "worker.py"
TWO_DEVICES = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


@pytest.fixture
def run(processes, port):
    """Start workers; returns how they ended unless told not to wait."""

    def start(what, count=3, only=None, extra=(), wait=True, **environment):
        for index in range(count) if only is None else only:
            processes.start(index, [WORKER, index, count, port, what, *extra], **environment)
        return processes.wait() if wait else None

    return start


@pytest.mark.parametrize("count", [2, 4])
def test_values(run, count):
    for index, result in enumerate(run("values", count)):
        assert result.code == 0, result.err
        everyone = [{"from": i} for i in range(count)]
        lines = [f"{everyone} of 0", "10000000", f"{index} {count} {index == 0}"]
        assert result.out.splitlines() == lines
        assert result.err == ""


def test_different_flags(run):
    sentence = "--other is [2] in process 2 and not given in process 0; start every process with the same command"
    for index, result in enumerate(run("facts")):
        assert result.code == 1
        assert sentence in result.err
        assert "--alike" not in result.err and "Traceback" not in result.err
        assert result.err.strip().startswith("error: " if index == 0 else f"process {index}: error: ")


def test_a_process_that_never_comes(run):
    for result in run("impatient", 4, only=[0, 2]):
        assert result.code == 1
        assert "error: processes 1, 3 of 4 did not come within 2 s; start the same command on every host" in result.err
        assert "Traceback" not in result.err


def test_process_0_never_comes(run):
    for result in run("impatient", only=[1, 2]):
        assert result.code == 1
        assert "error: process 0 of 3 did not come within 2 s (127.0.0.1:" in result.err
        assert "Traceback" not in result.err


def test_without_the_others_nobody_waits_for_them(port, monkeypatch):
    monkeypatch.setattr(team, "ROLL_CALL_SECONDS", 0.1)
    with pytest.raises(UserError, match="process 0 of 2 did not come"):
        distributed.start(distributed.Place(1, 2, f"127.0.0.1:{port}"), {})
    assert distributed.is_primary() and distributed.process_count() == 1 and distributed.take_reports(wait=True) == []
    distributed.finish()


def test_one_number_twice(processes, port):
    for name, index in enumerate([0, 1, 1]):
        processes.start(name, [WORKER, index, 3, port, "values"])
    for result in processes.wait():
        assert result.code == 1
        assert "two processes were started as process 1 of 3" in result.err


def test_other_counts(processes, port):
    processes.start(0, [WORKER, 0, 3, port, "values"])
    processes.start(1, [WORKER, 1, 2, port, "values"])
    for result in processes.wait():
        assert result.code == 1
        assert "process 1 was started as one of 2, process 0 as one of 3" in result.err


def test_taken_port(processes, port):
    with socket.create_server(("127.0.0.1", port)):
        processes.start(0, [WORKER, 0, 2, port, "values"])
        (result,) = processes.wait()
    assert result.code == 1
    assert f"error: process 0 cannot listen on port {port} (Address already in use)" in result.err


def test_strangers_are_passed_over(run, processes, port):
    """Whoever else knocks, in silence or with nonsense, neither joins nor ends the roll call."""
    run("values", only=[0], wait=False)
    words = [b"GET / HTTP/1.1\r\n\r\n", b"[]\n", json.dumps({"hello": "you"}).encode() + b"\n", b""]
    with contextlib.ExitStack() as knocking:
        strangers = [knocking.enter_context(connect(port)) for _ in words]
        for stranger, said in zip(strangers, words, strict=True):
            stranger.sendall(said)
        run("values", only=[1, 2], wait=False)
        assert [result.code for result in processes.wait()] == [0, 0, 0]


def connect(port: int) -> socket.socket:
    """Connect once process 0 listens."""
    deadline = time.monotonic() + 120
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_an_error_ends_all(run):
    results = run("error")
    assert [result.code for result in results] == [1, 1, 1]
    assert results[1].err == "process 1: error: file.txt: no such file\n"
    assert results[0].err == "\nerror: process 1 stopped: file.txt: no such file\n"
    assert results[2].err == "\nprocess 2: error: process 1 stopped: file.txt: no such file\n"


def test_a_bug_ends_all(run):
    results = run("bug")
    assert [result.code for result in results] == [1, 1, 1]
    assert "Traceback" in results[1].err and "ZeroDivisionError: a bug" in results[1].err
    for result in (results[0], results[2]):
        assert "error: process 1 stopped: ZeroDivisionError: a bug" in result.err
        assert "Traceback" not in result.err


def test_an_interrupt_ends_all(run):
    results = run("interrupted")
    assert [result.code for result in results] == [130, 130, 130]
    assert results[0].err == "interrupted\n"
    assert "error: process 0 stopped: interrupted" in results[1].err


def test_a_channel(run):
    first, *others = run("channel")
    assert (first.code, first.out, first.err) == (0, "", "")
    lines = [f"count {{'number': {number}}} {list(range(number))}" for number in range(3)]
    for other in others:
        assert (other.code, other.out.splitlines(), other.err) == (0, lines, "")


def test_before_another_ends_it_a_process_puts_its_things_in_order(run):
    first, _, third = run("last_wishes")
    assert (first.code, first.out, third.code) == (1, "in order\n", 1)
    assert first.err == "\nerror: process 1 stopped: file.txt: no such file\n" and "no such file" in third.err


def test_the_first_to_finish_waits(run):
    for result in run("early"):
        assert (result.code, result.out, result.err) == (0, "done\n", "")


def test_a_silent_process_ends_the_others(run, processes):
    run("silent", wait=False)
    processes.wait_for(0, "silent for 3 s")
    processes.wait_for(2, "silent for 3 s")
    processes.kill(1)
    zero, _, two = processes.wait()
    assert (zero.code, two.code) == (1, 1)
    assert "error: process 1 of 3 (on" in zero.err


def test_devices_of_all(run):
    for result in run("collective", **TWO_DEVICES):
        assert result.code == 0, result.err
        assert "sum 6.0" in result.out


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_collectives(run, processes, victim):
    """The others hang in a sum for which the victim never comes; all they say is one sentence."""
    run("collective", extra=[victim], wait=False, **TWO_DEVICES)
    for index in range(3):
        processes.wait_for(index, "sum 6.0")
    processes.kill(victim)
    results = processes.wait()
    for index, result in enumerate(results):
        if index != victim:
            start = f"\nprocess {index}: " if index else "\n"
            assert result.err.startswith(f"{start}error: process {victim} of 3 (on ")
            assert "ended without a word" in result.err and result.err.count("\n") == 2
            assert result.code == 1


SLURM = {"JOB_ID": 70001, "STEP_NODELIST": "node[07-08]", "NTASKS": 2, "PROCID": 1, "LOCALID": 0}
OPEN_MPI = {"MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "COMM_WORLD_SIZE": 4}
OPEN_MPI |= {"COMM_WORLD_RANK": 3, "COMM_WORLD_LOCAL_RANK": 1, "VERSION": "4.1.5"}


def set_all(monkeypatch, prefix, variables):
    for name, value in variables.items():
        monkeypatch.setenv(f"{prefix}_{name}", str(value))


def test_slurm(monkeypatch):
    set_all(monkeypatch, "SLURM", SLURM)
    place = distributed.detect()
    assert (place.index, place.count, place.local_device_ids) == (1, 2, [0])
    assert place.coordinator.startswith("node07:")
    assert "SLURM says that there are 2; start them with srun" in place.advice
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "9999")
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0,1,2,3")
    place = distributed.detect()
    assert place.coordinator == "node07:9999" and place.local_device_ids is None  # JAX reads the variable


def test_open_mpi(monkeypatch):
    set_all(monkeypatch, "OMPI", OPEN_MPI)
    place = distributed.detect()
    assert (place.index, place.count, place.local_device_ids) == (3, 4, [1])
    assert place.coordinator.startswith("10.96.0.1:")


def test_open_mpi_5_needs_mpi4py(monkeypatch):
    set_all(monkeypatch, "OMPI", OPEN_MPI | {"VERSION": "5.0.3"})
    with pytest.raises(UserError, match="Open MPI does not say .*mpi4py.*; give --coordinator"):
        distributed.detect()


def test_tpu_pod(monkeypatch):
    """As on a TPU host of GKE, which says it all in environment variables."""
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_WORKER_ID", "2")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "127.0.0.1,b,c,d")
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "1")
    monkeypatch.setenv("MEGASCALE_SLICE_ID", "0")
    place = distributed.detect()
    assert place[:3] == (2, 4, "127.0.0.1:8482") and place.local_device_ids is None


def test_alone(monkeypatch):
    set_all(monkeypatch, "SLURM", SLURM | {"NTASKS": 1, "PROCID": 0})
    assert distributed.detect() == distributed.ALONE
    distributed.start(distributed.ALONE, {"--x": 1})
    assert (distributed.gather(3), distributed.broadcast("y")) == ([3], "y")
    distributed.barrier("nobody to wait for")
    distributed.finish()


@pytest.mark.parametrize("address", ["host", "host:", ":80", "host:http", "host:70000", "host:0"])
def test_bad_addresses(address):
    with pytest.raises(UserError, match=f"--coordinator={address}: write HOST:PORT"):
        distributed.parse_address(address)


def test_addresses():
    assert distributed.parse_address("tpu-0.pod:8476") == ("tpu-0.pod", 8476)
    assert distributed.parse_address("[fe80::1]:22") == ("fe80::1", 22)
