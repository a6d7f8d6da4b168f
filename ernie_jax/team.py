"""A team: processes that know of each other, each connected to process 0, with a thread that watches the connections.

When a process dies, JAX's collectives hang in the others, and its own watchdog aborts them late and without a word. The
team's thread hears of it at once and ends its process with a sentence, whatever the main thread is waiting for.

A connection carries JSON objects, one a line: {"hello": ...} and {"welcome": ...} once, {} every BEAT_SECONDS as a sign
of life, {"say": name, "value": value} as a turn of `exchange`, {"report": value} for process 0 to read when it likes,
{"stop": reason, "code": exit code} as the last word.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from ernie_jax.errors import UserError

if TYPE_CHECKING:
    from ernie_jax.channel import Receiver, Sender

ROLL_CALL_SECONDS = 25.0
BEAT_SECONDS = 2.0
SILENCE_SECONDS = 20.0  # a dead process is noticed at once, this is for a dead machine or network
_HELLO_SECONDS = 2.0
_PROTOCOL = "ernie_jax team 1"
_END = "end"


class Team:
    """The processes 0 to count - 1, of which this is number `index`."""

    def __init__(self, index: int, count: int, connections: list[_Connection]):
        """Watch the connections: of process 0 to processes 1, 2, ... in this order, of another one to process 0."""
        self.index, self.count = index, count
        self.reports: queue.SimpleQueue[Any] = queue.SimpleQueue()  # process 0: of the others
        self.before_fall: Callable[[], None] = lambda: None  # called before another's end ends this process
        self._connections = connections
        self._last_word = threading.Lock()  # taken once: by the thread that ends the process
        threading.Thread(target=self._watch, name="team", daemon=True).start()

    def exchange(self, name: str, value: Any) -> list[Any]:
        """Return everybody's value, by process; each process must call it with the same name.

        Args:
          value: JSON.
        """
        if self.index:
            (leader,) = self._connections
            leader.send({"say": name, "value": value})
            return leader.inbox.get()[1]
        values = [value]
        for connection in self._connections:
            said, theirs = connection.inbox.get()
            if said != name:
                raise RuntimeError(f"process {connection.peer} is at {said!r}, process 0 at {name!r}")
            values.append(theirs)
        for connection in self._connections:
            connection.send({"say": name, "value": values})
        return values

    def report(self, value: Any) -> None:
        """Send a value (JSON) to process 0 and go on."""
        self._connections[0].send({"report": value})

    def open_channel(self) -> Sender | Receiver:
        """Open process 0's end of a channel to all others, or another process's end; all must call it.

        Raises:
          UserError: if a process can't reach process 0.
        """
        from ernie_jax import channel  # imports NumPy

        sockets = [connection.socket for connection in self._connections]
        if self.index:
            token, *ports = self.exchange("channel", None)[0]
            return channel.connect(sockets[0], ports[self.index - 1], token)
        with contextlib.ExitStack() as stack:
            listeners = [stack.enter_context(channel.listen(near)) for near in sockets]
            token = channel.make_token()
            self.exchange("channel", [token, *(listener.getsockname()[1] for listener in listeners)])
            return channel.accept(listeners, token)

    def end(self) -> None:
        """Wait until every process has come to its end; from here on each may go."""
        self.exchange(_END, None)

    def stop(self, words: str, reason: str, code: int) -> NoReturn:
        """End all processes: this one with these words on stderr, the others with the reason."""
        self._leave(words, f"process {self.index} stopped: {reason}", code)

    def _leave(self, words: str, reason: str, code: int) -> NoReturn:
        self._last_word.acquire()
        try:
            for connection in self._connections:
                connection.send_last({"stop": reason, "code": code})
            print(words, file=sys.stderr, end="\n" if words else "", flush=True)
            sys.stdout.flush()
        finally:
            os._exit(code)  # at an ordinary exit JAX would wait for the others

    def _fall(self, reason: str, code: int) -> NoReturn:
        """End this process for what another one has done; process 0 passes it on."""
        self.before_fall()
        self._leave(f"\n{prefix(self.index)}error: {reason}", reason, code)  # a progress bar may stand in the line

    def _watch(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                for connection in self._connections:
                    selector.register(connection.socket, selectors.EVENT_READ, connection)
                beaten = 0.0
                while selector.get_map():
                    for key, _ in selector.select(BEAT_SECONDS):
                        if not self._listen(key.data):
                            selector.unregister(key.fileobj)
                    now = time.monotonic()
                    if now - beaten >= BEAT_SECONDS:
                        beaten = now
                        for connection in self._connections:
                            connection.beat()
                    for key in list(selector.get_map().values()):
                        if now - key.data.heard > SILENCE_SECONDS:
                            self._fall(f"{self._name(key.data)} has been silent for {SILENCE_SECONDS:.0f} s", 1)
        except Exception:  # unwatched, the process could hang for ever
            self._leave(traceback.format_exc(), "its watching thread failed", 1)

    def _listen(self, connection: _Connection) -> bool:
        """Take what a connection brings; returns whether there can be more."""
        messages = connection.read()
        if messages is None:
            if connection.ended:
                return False
            self._fall(
                f"{self._name(connection)} ended without a word (killed, crashed, or cut off); see what it printed, "
                "then start all processes again",
                1,
            )
        for message in messages:
            match message:
                case {"say": name, "value": value}:
                    connection.ended |= name == _END
                    connection.inbox.put((name, value))
                case {"report": value}:
                    self.reports.put(value)
                case {"stop": reason, "code": code}:
                    self._fall(reason, code)
        return True

    def _name(self, connection: _Connection) -> str:
        return f"process {connection.peer} of {self.count} (on {connection.host})"


def prefix(index: int) -> str:
    """Return what goes before an error of process `index`: process 0 speaks for all."""
    return f"process {index}: " if index else ""


def form(index: int, count: int, host: str, port: int, advice: str) -> Team:
    """Wait until all processes are there, at most ROLL_CALL_SECONDS.

    Args:
      host, port: where process 0 listens; on its own machine only if the host is a loopback address.
      advice: ends the sentence about processes that did not come.

    Raises:
      UserError: in all that came, if one did not come, or came twice or with another count.
    """
    if index == 0:
        return Team(0, count, _call_roll(count, host, port, advice))
    return Team(index, count, [_answer_roll(index, count, host, port, advice)])


def is_loopback(host: str) -> bool:
    """Tell whether a host name means "this machine", so that nobody else need reach it."""
    return host in ("localhost", "127.0.0.1")


class _Connection:
    """One end of a connection. `ended` once the other end may go without a word."""

    def __init__(self, connected: socket.socket):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.settimeout(None)
        self.socket = connected
        self.peer, self.host = 0, ""
        self.inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.ended = False
        self.heard = time.monotonic()
        self._sending = threading.Lock()
        self._buffer = bytearray()

    def send(self, message: dict) -> None:
        """Send from the main thread. That the other end is gone is for the watching thread to see and say."""
        with self._sending, contextlib.suppress(OSError):
            self.socket.sendall(_encode(message))

    def beat(self) -> None:
        """Give a sign of life, unless a message is on its way, which is one."""
        if self._sending.acquire(blocking=False):
            try:
                with contextlib.suppress(OSError):
                    self.socket.send(_encode({}), socket.MSG_DONTWAIT)
            finally:
                self._sending.release()

    def send_last(self, message: dict) -> None:
        """Send if it takes no longer than a second."""
        if self._sending.acquire(timeout=1):
            with contextlib.suppress(OSError):
                self.socket.settimeout(1)
                self.socket.sendall(_encode(message))

    def read(self) -> list[dict] | None:
        """Return the messages that have come in full; None at the end."""
        try:
            data = self.socket.recv(1 << 18)
        except OSError:
            data = b""
        if not data:
            return None
        self.heard = time.monotonic()
        self._buffer += data
        if b"\n" not in data:
            return []
        *lines, self._buffer = self._buffer.split(b"\n")
        return [json.loads(line) for line in lines]

    def read_first(self, seconds: float) -> dict | None:
        """Return the first message, and leave what follows; None if nothing sensible comes in time."""
        deadline = time.monotonic() + seconds
        line = b""
        try:
            while not line.endswith(b"\n"):
                self.socket.settimeout(max(0.01, deadline - time.monotonic()))
                byte = self.socket.recv(1)
                if not byte or len(line) > 10_000:
                    return None
                line += byte
            message = json.loads(line)
        except (OSError, ValueError):
            return None
        self.socket.settimeout(None)
        return message if isinstance(message, dict) else None


def _encode(message: dict) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _call_roll(count: int, host: str, port: int, advice: str) -> list[_Connection]:
    """Take one connection of every other process."""
    found: dict[int, _Connection] = {}
    deadline = time.monotonic() + ROLL_CALL_SECONDS
    newcomer = None
    with _listener(host, port) as server:
        try:
            while len(found) < count - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    accepted, address = server.accept()
                except TimeoutError:
                    missing = sorted(set(range(1, count)) - set(found))
                    who = f"process{'es' * (len(missing) > 1)} {', '.join(map(str, missing))} of {count}"
                    raise UserError(f"{who} did not come within {ROLL_CALL_SECONDS:.0f} s; {advice}") from None
                newcomer = _Connection(accepted)
                hello = newcomer.read_first(_HELLO_SECONDS)
                if hello is None or hello.get("hello") != _PROTOCOL:
                    accepted.close()  # not one of ours: a port scanner, a health check
                    continue
                index = newcomer.peer = hello["process"]
                newcomer.host = hello["host"]
                if hello["of"] != count:
                    raise UserError(f"process {index} was started as one of {hello['of']}, process 0 as one of {count}")
                if index in found:
                    hosts = f"on {found[index].host} and on {newcomer.host}"
                    raise UserError(f"two processes were started as process {index} of {count}, {hosts}")
                found[index] = newcomer
        except UserError as error:
            for connection in {*found.values(), *filter(None, [newcomer])}:
                connection.send_last({"stop": str(error), "code": 1})
            raise
    connections = [found[index] for index in range(1, count)]
    for connection in connections:
        connection.heard = time.monotonic()
        connection.send({"welcome": socket.gethostname()})
    return connections


def _listener(host: str, port: int) -> socket.socket:
    """Listen on the loopback interface if that is meant, else on all: a host may not own the address its name has."""
    try:
        if is_loopback(host):
            return socket.create_server(("127.0.0.1", port))
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port} ({os.strerror(error.errno)}); another run may still be there"
        ) from None


def _answer_roll(index: int, count: int, host: str, port: int, advice: str) -> _Connection:
    """Connect to process 0, which may start later."""
    deadline = time.monotonic() + ROLL_CALL_SECONDS
    while True:
        try:
            connection = _Connection(socket.create_connection((host, port), max(1.0, deadline - time.monotonic())))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process 0 of {count} did not come within {ROLL_CALL_SECONDS:.0f} s ({host}:{port}: "
                    f"{error.strerror or error}); {advice}"
                ) from None
            time.sleep(0.2)
    connection.send({"hello": _PROTOCOL, "process": index, "of": count, "host": socket.gethostname()})
    answer = connection.read_first(ROLL_CALL_SECONDS + 2 * _HELLO_SECONDS)
    match answer:
        case {"welcome": leader}:
            connection.host = leader
        case {"stop": reason}:
            raise UserError(reason)
        case _:
            raise UserError(f"{host}:{port}: what answers there is not process 0 of this run, or it ended; {advice}")
    return connection
