"""Several processes that run one command together, on one host or many.

`start` finds the others, checks that all were started alike, and initialises `jax.distributed`. Everything here works
in a single process too, where there is nobody to wait for.

Values travel beside the devices, over the team's connections: use them for small facts on which all must agree.
JAX is imported where it is needed: whoever only asks which process this is gets by without.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ernie_jax import team
from ernie_jax.errors import UserError

if TYPE_CHECKING:
    from ernie_jax.channel import Receiver, Sender

_JAX_SECONDS = 60  # for jax.distributed, which starts when all are known to be there
_NEWS_SECONDS = 3.0


class Place(NamedTuple):
    """Where a process stands.

    Attributes:
      index, count: its number, of how many.
      coordinator: HOST:PORT where process 0 listens.
      advice: what to do if not all come.
      local_device_ids: what it may use of the host's devices; None for all.
    """

    index: int
    count: int
    coordinator: str
    advice: str = "start the same command on every host, each with its own --process_id"
    local_device_ids: list[int] | None = None


ALONE = Place(0, 1, "")
_place = ALONE
_team: team.Team | None = None


def detect() -> Place:
    """Ask the environment (Open MPI, SLURM, a TPU pod) which of several processes this is.

    As JAX does, it gives a process one device of the host under Open MPI and SLURM unless JAX_LOCAL_DEVICE_IDS says
    which, and obeys JAX_COORDINATOR_PORT.

    Raises:
      UserError: if the environment is one of these but does not say.
    """
    from jax._src import clusters  # the detection in jax.distributed.initialize, which keeps what it finds to itself

    # Not all that JAX knows: on Kubernetes it would warn every process, also those that run alone.
    known = (
        (clusters.OmpiCluster, "Open MPI", "mpirun"),
        (clusters.SlurmCluster, "SLURM", "srun"),
        (clusters.GkeTpuCluster, "the TPU pod", "the same job on every host"),
        (clusters.GceTpuCluster, "the TPU pod", "gcloud compute tpus tpu-vm ssh --worker=all"),
    )
    for cluster, name, starter in known:
        if not _is_present(cluster):
            continue
        try:
            if (count := cluster.get_process_count()) == 1:
                return ALONE
            index = cluster.get_process_id()
            address = cluster.get_coordinator_address(
                timeout_secs=int(team.ROLL_CALL_SECONDS),
                override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"),
            )
            told = "TPU" in name or "JAX_LOCAL_DEVICE_IDS" in os.environ
            local = None if told else cluster.get_local_process_id()
        except (RuntimeError, OSError, LookupError, ValueError) as error:
            raise UserError(
                f"{name} does not say which process this is ({error}); give --coordinator, --num_processes and "
                "--process_id"
            ) from None
        advice = f"{name} says that there are {count}; start them with {starter}"
        return Place(index, count, address, advice, None if local is None else [local])
    return ALONE


def _is_present(cluster: Any) -> bool:
    try:
        return cluster.is_env_present()
    except OSError:  # a TPU without Google Cloud's metadata server is no part of a pod
        return False


def start(place: Place, facts: Mapping[str, Any], devices: bool = True) -> None:
    """Meet the other processes and check that all were started alike.

    Args:
      facts: by name, JSON: what must be equal everywhere.
      devices: also initialise `jax.distributed`, so that `jax.devices` are those of all processes. Must come before
        any use of a device.

    Raises:
      UserError: in every process, if one does not come within 25 s or a fact differs.
    """
    global _place, _team
    _place = place
    if place.count == 1:
        return
    host, port = parse_address(place.coordinator)
    _team = team.form(place.index, place.count, host, port, place.advice)
    agree(facts)
    if devices:
        _initialize_jax(place, host)


def parse_address(address: str) -> tuple[str, int]:
    """Split HOST:PORT; the host of an IPv6 address stands in brackets.

    Raises:
      UserError: if it is not of this form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator={address}: write HOST:PORT, a host name or address and a port up to 65535")
    return host.removeprefix("[").removesuffix("]"), int(port)


def process_index() -> int:
    """Return the number of this process, from 0."""
    return _team.index if _team else 0


def process_count() -> int:
    """Return how many processes run this command together: those that have met, so that nobody waits for others."""
    return _team.count if _team else 1


def is_primary() -> bool:
    """Tell whether this is process 0: the one that prints and writes single files."""
    return process_index() == 0


def gather(value: Any) -> list[Any]:
    """Return everybody's value (JSON), by process."""
    return _team.exchange("gather", value) if _team else [value]


def broadcast(value: Any = None) -> Any:
    """Return the value (JSON) that process 0 gives; what others give does not count."""
    return _team.exchange("broadcast", value if is_primary() else None)[0] if _team else value


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if _team:
        _team.exchange(f"barrier {name}", None)


def report(value: Any) -> None:
    """Send a value (JSON) to process 0 and go on; not for process 0 itself."""
    _team.report(value)


def take_reports(wait: bool = False) -> list[Any]:
    """Return what the others have reported to process 0 since it last asked.

    Args:
      wait: until there is something.
    """
    if not _team:
        return []
    taken = [_team.reports.get()] if wait else []
    while not _team.reports.empty():
        taken.append(_team.reports.get())
    return taken


def open_channel() -> Sender | Receiver:
    """Open process 0's end of a channel to all others, or another process's end; all of several must call it.

    Raises:
      UserError: if a process can't reach process 0.
    """
    return _team.open_channel()


def before_fall(function: Callable[[], None]) -> None:
    """Have a function called, in a thread of its own, before another process's end ends this one."""
    if _team:
        _team.before_fall = function


def agree(facts: Mapping[str, Any]) -> None:
    """Check that every process gives the same facts (JSON).

    Raises:
      UserError: in every process, naming what differs.
    """
    first, *others = gather(dict(facts))
    for index, theirs in enumerate(others, 1):
        for name in {**first, **theirs}:
            mine, other = (json.dumps(values.get(name)) for values in (first, theirs))
            if mine != other:
                raise UserError(
                    f"{name} is {_spell(other)} in process {index} and {_spell(mine)} in process 0; start every "
                    "process with the same command and the same files"
                )


def say(message: str) -> None:
    """Tell the user something that is no error, once for all processes."""
    if is_primary():
        print(message, file=sys.stderr)


def finish() -> None:
    """Wait for the others at the end of the work, and part."""
    global _team, _place
    if _team:
        _team.end()
        if "jax" in sys.modules:
            import jax

            if jax.distributed.is_initialized():
                jax.distributed.shutdown()
    _team, _place = None, ALONE


def stop(words: str, code: int) -> NoReturn:
    """End this process with words on stderr and an exit code; of several, the others end too and say why."""
    words = team.prefix(_place.index) + words if words else ""
    if _team:
        _team.stop(words, words.partition("error: ")[2] or words or "nobody reads its output", code)
    print(words, file=sys.stderr, end="\n" if words else "")
    sys.exit(code)


def crash(error: Exception) -> NoReturn:
    """End this process of several for a bug, with its traceback, and the others too.

    A collective also raises when another process has died: then the sentence that says so is better than a traceback,
    and comes while we wait here.
    """
    if not _team:
        raise error
    time.sleep(_NEWS_SECONDS)
    _team.stop("".join(traceback.format_exception(error)), f"{type(error).__name__}: {error}", 1)


def _initialize_jax(place: Place, host: str) -> None:
    """Start `jax.distributed`: its service on a free port of process 0, and in the others a relay to it."""
    import jax

    port = None
    if place.index == 0:
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
    port = broadcast(port)
    every = "[::]" if socket.has_dualstack_ipv6() else "0.0.0.0"
    os.environ["no_grpc_proxy"] = "127.0.0.1"  # noqa: SIM112 (gRPC reads this one); it is where all connections go
    jax.config.update("jax_check_proxy_envs", False)
    jax.distributed.initialize(
        f"127.0.0.1:{_relay(host, port) if place.index else port}",
        place.count,
        place.index,
        local_device_ids=place.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=_JAX_SECONDS,
        shutdown_timeout_seconds=_JAX_SECONDS,
        coordinator_bind_address=f"{'127.0.0.1' if team.is_loopback(host) else every}:{port}",
    )


def _relay(host: str, port: int) -> int:
    """Forward a port of this machine to one of process 0, and return it.

    When JAX's client loses its connection to process 0 it aborts the process, with a page of log. Here the near end of
    the connection stays open, and the team's thread ends the process with a sentence.
    """
    server = socket.create_server(("127.0.0.1", 0))
    held = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)

    def serve(near: socket.socket, far: socket.socket) -> None:
        pump(near, far)
        far.close()  # our own client has gone

    def accept() -> None:
        while True:
            near, _ = server.accept()
            far = _connect(host, port)
            held.append(near)
            threading.Thread(target=serve, args=(near, far), daemon=True).start()
            threading.Thread(target=pump, args=(far, near), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return server.getsockname()[1]


def _connect(host: str, port: int) -> socket.socket:
    """Connect to JAX's service, which process 0 is about to start."""
    deadline = time.monotonic() + _JAX_SECONDS
    while True:
        try:
            return socket.create_connection((host, port))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _spell(value: str) -> str:
    return "not given" if value == "null" else value.strip('"')
