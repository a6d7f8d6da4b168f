"""A server whose engine other processes follow, when one of them ends or a step fails; tests/hosts has real ones."""

import contextlib
import json
import threading
import time

import httpx2
import pytest

from ernie_jax import distributed
from tests.server.conftest import running
from tests.server.storm import PATIENCE

BODY = {"prompt": "In the beginning", "max_tokens": 200, "ignore_eos": True, "stream": True}


@contextlib.contextmanager
def stream(server, **body):
    """Begin a stream; yields an iterator over its events, of which the first has come."""
    with httpx2.stream("POST", f"{server.url}/v1/completions", json=BODY | body, timeout=PATIENCE) as response:
        lines = (line[6:] for line in response.iter_lines() if line.startswith("data: "))
        next(lines)
        yield lines


def test_answers_end_though_the_engine_hangs(llm, monkeypatch):
    """Another process has died in the midst of a step: a collective waits for it for ever."""
    real, hangs, released = llm.engine.step, threading.Event(), threading.Event()
    asked = threading.Event()

    def step():
        if asked.is_set():
            hangs.set()
            released.wait()
        return real()

    monkeypatch.setattr(llm.engine, "step", step)
    echo = {"prompt": "a", "echo": True, "logprobs": 1, "max_tokens": 1}
    try:
        with running(llm) as server:
            with stream(server) as answer:
                asked.set()
                assert hangs.wait(20)
                scoring, url = [], f"{server.url}/v1/completions"
                asking = threading.Thread(target=lambda: scoring.append(httpx2.post(url, json=echo, timeout=PATIENCE)))
                asking.start()
                while not server.runner._calls:
                    time.sleep(0.01)
                server.loop.call_soon_threadsafe(server.listener.abandon)
                *_, last = answer
            asking.join()
        assert json.loads(last)["error"]["code"] == "engine_failed"
        assert "lost one of its processes" in json.loads(last)["error"]["message"]
        assert scoring[0].status_code == 503 and scoring[0].json()["error"]["code"] == "engine_failed"
        assert len(server.ledger.entries) == 1 and server.runner.open == 0
    finally:
        released.set()
        server.runner._stopping = True
        server.runner._thread.join()
        llm.engine.reset()


def test_a_step_that_fails_ends_the_server(llm, monkeypatch):
    """The others may be in the midst of it, so there is no beginning anew."""
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    monkeypatch.setattr(llm.engine, "reset", lambda: pytest.fail("the others have not reset"))
    with running(llm) as server:
        with stream(server) as answer:
            error = RuntimeError("out of memory")
            with monkeypatch.context() as patch:
                patch.setattr(llm.engine, "step", lambda: (_ for _ in ()).throw(error))
                *_, last = answer
        assert json.loads(last)["error"]["message"].startswith("The server failed while")
        server.thread.join(60)
        assert not server.thread.is_alive() and server.runner.failure is error
    monkeypatch.undo()
    llm.engine.reset()


def test_another_process_passes_a_signal_on(llm, monkeypatch):
    reports = [["end"], ["end"]]  # by two of them
    with running(llm) as server:
        with stream(server, max_tokens=20) as answer:
            monkeypatch.setattr(distributed, "take_reports", lambda: reports.pop() if reports else [])
            assert json.loads([*answer][-2])["choices"][0]["finish_reason"] == "length"
        server.thread.join(60)
        assert not server.thread.is_alive() and not reports and not server.listener.force_exit
