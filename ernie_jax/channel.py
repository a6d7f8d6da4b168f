"""A channel: frames from process 0 to all others, for what must arrive within a fraction of a step of the model.

Each of the others has a TCP connection of its own to process 0, beside that of the team, which watches over them all.
A frame is a word, a fact (JSON) and some arrays: the lengths of the JSON and of the whole, the JSON, the arrays' bytes.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ernie_jax.errors import UserError

OPEN_SECONDS = 25.0
_HELLO_SECONDS = 2.0
_LENGTHS = struct.Struct("<IQ")
_TOKEN_BYTES = 32


class Frame(NamedTuple):
    """What was sent."""

    word: str
    fact: Any
    arrays: list[np.ndarray]


class Sender:
    """Process 0's end. That another process has gone is for the team to notice and to say."""

    def __init__(self, connections: Sequence[socket.socket]):
        self._connections = connections

    def send(self, word: str, fact: Any = None, arrays: Sequence[np.ndarray] = ()) -> None:
        """Send a frame to all; it waits only for one who does not keep up."""
        forms = [(array.dtype.str, array.shape) for array in arrays]
        head = json.dumps((word, fact, forms)).encode()
        size = len(head) + sum(array.nbytes for array in arrays)
        frame = b"".join([_LENGTHS.pack(len(head), size), head, *(array.tobytes() for array in arrays)])
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.sendall(frame)


class Receiver:
    """The end of another process."""

    def __init__(self, connection: socket.socket):
        self._file = connection.makefile("rb")

    def receive(self) -> Frame:
        """Wait for the next frame; its arrays can't be written to.

        Raises:
          ConnectionError: if process 0 has gone.
        """
        head_size, size = _LENGTHS.unpack(self._read(_LENGTHS.size))
        data = self._read(size)
        word, fact, forms = json.loads(data[:head_size])
        arrays, offset = [], head_size
        for form, shape in forms:
            array = np.frombuffer(data, form, int(np.prod(shape)), offset).reshape(shape)
            arrays.append(array)
            offset += array.nbytes
        return Frame(word, fact, arrays)

    def _read(self, size: int) -> bytes:
        if len(data := self._file.read(size)) < size:
            raise ConnectionError("process 0 closed its channel")
        return data


def make_token() -> str:
    """Return what the others must say to be let in."""
    return secrets.token_hex(_TOKEN_BYTES)


def listen(near: socket.socket) -> socket.socket:
    """Listen on the interface, and only there, over which another process has come on a connection."""
    host = near.getsockname()[0].removeprefix("::ffff:")  # IPv4 on a socket for both
    return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def accept(listeners: Sequence[socket.socket], token: str) -> Sender:
    """Let process 1 in by the first listener, process 2 by the second, ...

    Raises:
      UserError: if one does not come within OPEN_SECONDS.
    """
    deadline = time.monotonic() + OPEN_SECONDS
    return Sender([_admit(index, listener, token, deadline) for index, listener in enumerate(listeners, 1)])


def connect(far: socket.socket, port: int, token: str) -> Receiver:
    """Open a process's end.

    Args:
      far: its connection to process 0.
      port: where process 0 listens for it.

    Raises:
      UserError: if process 0 can't be reached there.
    """
    host = far.getpeername()[0]
    try:
        connection = socket.create_connection((host, port), OPEN_SECONDS)
        connection.sendall(token.encode())
    except OSError as error:
        raise UserError(
            f"process 0 can't be reached at {host} on port {port} ({error.strerror or error}); the hosts must reach it "
            "on all its ports"
        ) from None
    connection.settimeout(None)
    return Receiver(connection)


def _admit(index: int, listener: socket.socket, token: str, deadline: float) -> socket.socket:
    """Wait for a process that knows the token; whoever else knocks is passed over."""
    while (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            break
        if hmac.compare_digest(_read_hello(connection), token.encode()):
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        connection.close()
    raise UserError(
        f"process {index} did not open its channel on port {listener.getsockname()[1]} of process 0 within "
        f"{OPEN_SECONDS:.0f} s; the hosts must reach process 0 on all its ports"
    )


def _read_hello(connection: socket.socket) -> bytes:
    """Return what a newcomer says first, as far as it comes in time."""
    said, deadline = b"", time.monotonic() + _HELLO_SECONDS
    with contextlib.suppress(OSError):
        while (missing := 2 * _TOKEN_BYTES - len(said)) and (left := deadline - time.monotonic()) > 0:
            connection.settimeout(left)
            if not (more := connection.recv(missing)):
                break
            said += more
    return said
