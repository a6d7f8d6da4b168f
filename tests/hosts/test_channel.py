"""The channel from process 0 to the others: what comes through it, and who is let in."""

import contextlib
import socket
import threading

import numpy as np
import pytest

from ernie_jax import channel
from ernie_jax.errors import UserError


@contextlib.contextmanager
def meeting():
    """Yield process 0's listener and the other process's connection to it, as a team has them."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as far:
        near, _ = server.accept()
        with near, channel.listen(near) as listener:
            yield listener, far


def in_thread(function, *args):
    """Call a function in a thread; returns a function that waits for what it returns."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*args)))
    thread.start()

    def result():
        thread.join(60)
        return found[0]

    return result


@pytest.fixture
def ends():
    """A sender and a receiver."""
    token = channel.make_token()
    with meeting() as (listener, far):
        assert listener.getsockname()[0] == "127.0.0.1"
        receiver = in_thread(channel.connect, far, listener.getsockname()[1], token)
        yield channel.accept([listener], token), receiver()


def test_frames(ends, rng):
    sender, receiver = ends
    large = rng.integers(-(2**31), 2**31, (3, 1 << 20), dtype=np.int32)
    sent = [
        ("nothing", None, []),
        ("facts", [1, "ä", {"seed": 2**64 - 1, "temperature": 0.1}], []),
        ("arrays", 0, [large, np.array(5, np.int32), np.zeros((0, 4), np.uint8), large[:, ::7]]),
        ("last", False, [np.ones(2)]),
    ]
    waiting = in_thread(lambda: [receiver.receive() for _ in sent])
    for frame in sent:
        sender.send(*frame)
    for (word, fact, arrays), frame in zip(sent, waiting(), strict=True):
        assert (frame.word, frame.fact, len(frame.arrays)) == (word, fact, len(arrays))
        for ours, theirs in zip(arrays, frame.arrays, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


def test_the_end_of_process_0(ends):
    sender, receiver = ends
    sender.send("half")
    for connection in sender._connections:
        connection.close()
    assert receiver.receive().word == "half"
    with pytest.raises(ConnectionError, match="process 0 closed its channel"):
        receiver.receive()


def test_the_end_of_another_is_not_the_channels_business(ends):
    sender, receiver = ends
    receiver._file.close()
    for _ in range(100):
        sender.send("x", None, [np.zeros(10_000)])


def test_strangers_are_not_let_in(monkeypatch):
    monkeypatch.setattr(channel, "_HELLO_SECONDS", 0.5)
    token = channel.make_token()
    words = [b"", b"GET / HTTP/1.1\r\n\r\n", channel.make_token().encode(), token[:-1].encode() + b"?"]
    with contextlib.ExitStack() as stack:
        listener, far = stack.enter_context(meeting())
        strangers = [stack.enter_context(socket.create_connection(listener.getsockname())) for _ in words]
        for stranger, said in zip(strangers, words, strict=True):
            stranger.sendall(said)
        receiver = in_thread(channel.connect, far, listener.getsockname()[1], token)
        channel.accept([listener], token).send("welcome")
        assert receiver().receive().word == "welcome"
        for stranger in strangers:
            stranger.settimeout(30)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""


def test_one_that_never_comes(monkeypatch):
    monkeypatch.setattr(channel, "OPEN_SECONDS", 0.3)
    with meeting() as (listener, _), pytest.raises(UserError, match=r"process 1 did not open its channel on port \d+"):
        channel.accept([listener], channel.make_token())


def test_a_port_that_is_closed():
    with meeting() as (listener, far):
        port = listener.getsockname()[1]
        listener.close()
        with pytest.raises(UserError, match=rf"can't be reached at 127.0.0.1 on port {port} \(Connection ref"):
            channel.connect(far, port, channel.make_token())


def test_interfaces():
    """It listens where the other process has come in, also where one socket takes IPv4 and IPv6."""
    with contextlib.ExitStack() as stack:
        both = stack.enter_context(socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True))
        for host, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
            stack.enter_context(socket.create_connection((host, both.getsockname()[1])))
            near, _ = both.accept()
            with near, channel.listen(near) as listener:
                assert (listener.getsockname()[0], listener.family) == (host, family)
