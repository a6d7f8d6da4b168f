"""Several processes on this machine, as if they were hosts."""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PATIENCE = 300  # seconds: programs are compiled when they are needed, also on a busy machine


@dataclasses.dataclass
class Result:
    code: int
    out: str
    err: str


class Processes:
    """Processes of one run, told by flags or environment variables which they are."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._started: dict[int, subprocess.Popen] = {}

    def start(self, index: int, arguments: Sequence[object], cwd: pathlib.Path = ROOT, **environment: object) -> None:
        """Start a Python process with the arguments; what it prints goes to files."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
        variables = clean | {"PYTHONPATH": str(ROOT)} | {name: str(value) for name, value in environment.items()}
        with self._file(index, "out").open("w") as out, self._file(index, "err").open("w") as err:
            self._started[index] = subprocess.Popen(
                [sys.executable, *map(str, arguments)], stdout=out, stderr=err, env=variables, cwd=cwd
            )

    def kill(self, index: int) -> None:
        self._started[index].kill()

    def signal(self, index: int, number: int) -> None:
        self._started[index].send_signal(number)

    def wait(self) -> list[Result]:
        """Return how each ended, by index; fails if one does not."""
        deadline = time.monotonic() + PATIENCE
        codes = {i: self._started[i].wait(max(0.1, deadline - time.monotonic())) for i in sorted(self._started)}
        return [Result(code, self._read(i, "out"), self._read(i, "err")) for i, code in codes.items()]

    def wait_for(self, index: int, text: str) -> None:
        """Wait until a process has printed something."""
        deadline = time.monotonic() + PATIENCE
        while text not in (printed := self.printed(index)):
            assert time.monotonic() < deadline, printed
            time.sleep(0.05)

    def printed(self, index: int) -> str:
        return self._read(index, "out") + self._read(index, "err")

    def end(self) -> None:
        for process in self._started.values():
            process.kill()
            process.wait()

    def _read(self, index: int, kind: str) -> str:
        return self._file(index, kind).read_text()

    def _file(self, index: int, kind: str) -> pathlib.Path:
        return self._folder / f"{kind}.{index}"


@pytest.fixture
def processes(tmp_path) -> Iterator[Processes]:
    folder = tmp_path / "processes"
    folder.mkdir()
    running = Processes(folder)
    yield running
    running.end()


@pytest.fixture
def port() -> int:
    return free_port()


_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_ports = itertools.cycle(random.sample(range(20_000 + 1000 * (_WORKER % 12), 21_000 + 1000 * (_WORKER % 12)), 1000))


def free_port() -> int:
    """Return a port of this worker that nobody listens at, of those that the system never gives out by itself."""
    for port in _ports:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def flags(index: int, count: int, port: int) -> list[str]:
    return [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={index}"]
