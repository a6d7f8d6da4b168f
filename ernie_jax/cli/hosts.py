"""The flags with which several processes run one command, on one host or many."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import signal
import socket
import sys
import types
from collections.abc import Iterator

from absl import flags

from ernie_jax import distributed
from ernie_jax.cli.command import UsageError
from ernie_jax.errors import UserError
from ernie_jax.version import VERSION

_NAMED = 8  # hosts in the start-up line
_OWN = ("coordinator", "process_id")  # may differ: a host can have two names


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags that tell a process of the others."""
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0, when several processes run this command together; on TPU pods, SLURM and Open MPI the "
        "three flags are found",
        flag_values=values,
    )
    flags.DEFINE_integer("num_processes", None, "how many processes there are", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "the number of this one, from 0", lower_bound=0, flag_values=values)


def join(values: flags.FlagValues, devices: bool = True) -> None:
    """Meet the processes that run this command too, and say which; only process 0 goes on writing to stdout.

    Args:
      devices: make `jax.devices` those of all processes.

    Raises:
      UsageError: if the flags contradict each other.
      UserError: if a process does not come or was started differently.
    """
    facts = {f"--{name}": values[name].value for name in values if name not in _OWN}
    facts |= {"ernie_jax's version": VERSION, "JAX's version": importlib.metadata.version("jax")}
    distributed.start(_place(values), facts, devices)
    if distributed.process_count() > 1:
        _own_stdout()
        names = list(dict.fromkeys(distributed.gather(socket.gethostname())))
        more = ", ..." if len(names) > _NAMED else ""
        distributed.say(f"{distributed.process_count()} processes on {', '.join(names[:_NAMED])}{more}")


@contextlib.contextmanager
def leading(engine) -> Iterator[None]:
    """Have the engines of the other processes, if there are any, follow this one's."""
    if distributed.process_count() == 1:
        yield
        return
    with engine.lead(distributed.open_channel()):
        yield


def follow(engine) -> None:
    """Do what process 0's engine does, until it ends. The first signal to end is passed on to it, as a report."""
    signals = (signal.SIGTERM, signal.SIGINT)

    def pass_on(number: int, frame: types.FrameType | None) -> None:
        for every in signals:
            signal.signal(every, signal.SIG_IGN)
        distributed.report("end")

    receiver = distributed.open_channel()
    for number in signals:
        signal.signal(number, pass_on)
    engine.follow(receiver)
    for number in signals:  # the end has come
        signal.signal(number, signal.SIG_IGN)


def refuse_several(command: str) -> None:
    """Check that the environment has started one process only, for a command that knows no others.

    Raises:
      UserError: if it has started several.
    """
    if (place := distributed.detect()).count > 1:
        raise UserError(f"{command} runs in one process, and here are {place.count}: use a machine of its own")


def _own_stdout() -> None:
    """Keep stdout for what process 0 prints: the collectives' libraries write greetings there."""
    if distributed.is_primary():
        ours = os.dup(sys.stdout.fileno())
        sys.stdout = open(ours, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115
        os.dup2(sys.stderr.fileno(), 1)
    else:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _place(values: flags.FlagValues) -> distributed.Place:
    given = {name: values[name].value for name in ("coordinator", "num_processes", "process_id")}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return distributed.detect()
    if missing:
        raise UsageError(f"--coordinator, --num_processes and --process_id go together; give {' and '.join(missing)}")
    distributed.parse_address(values.coordinator)
    if values.process_id >= values.num_processes:
        raise UsageError(
            f"--process_id={values.process_id}: the numbers of {values.num_processes} processes are 0 to "
            f"{values.num_processes - 1}"
        )
    return distributed.Place(values.process_id, values.num_processes, values.coordinator)
