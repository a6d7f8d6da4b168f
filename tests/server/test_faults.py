"""Whatever fails, the server answers or ends cleanly, and the ledger is exact."""

import contextlib
import itertools
import json
import random
import signal
import sqlite3
import threading
import time

import httpx2
import pytest

from ernie_jax.server.hooks import FileLedger
from ernie_jax.server.ledger import OPEN, Ledger, totals
from tests.server.conftest import running, serving
from tests.server.storm import PATIENCE
from tests.server.test_load import NAME, PROMPTS, post, wait_for

CLIENTS = 6


def rows(path):
    """Return {request's id: (prompt, cached, generated, status)}; every id has one row."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        query = "SELECT request_id, prompt_tokens, cached_tokens, generated_tokens, status FROM requests"
        found = database.execute(query).fetchall()
    assert len({request for request, *_ in found}) == len(found)
    return {request: tuple(rest) for request, *rest in found}


class Clients:
    """Ask until the server is gone.

    Attributes:
      begun: ids of requests of which a part of the answer came.
      done: id -> (prompt, cached, generated) of those that were answered to their end.
      lost: ids of those that were not, and whatever else they were told.
    """

    def __init__(self, url, life=""):
        self.begun, self.done, self.lost = set(), {}, {}
        self._url = url
        self._threads = [threading.Thread(target=self._work, args=(f"{life}{i}",)) for i in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def join(self):
        for thread in self._threads:
            thread.join()

    def _work(self, name):
        rng = random.Random()
        with httpx2.Client(base_url=self._url, timeout=PATIENCE) as http:
            for number in itertools.count():
                request = f"{name}-{number}"
                body = {"prompt": rng.choice(PROMPTS), "max_tokens": rng.randrange(1, 60), "ignore_eos": True}
                headers = {"x-request-id": request}
                try:
                    if rng.random() < 0.3:
                        response = http.post("/v1/completions", json=body, headers=headers)
                        told = response.json()
                    else:
                        told = self._stream(http, body, headers, request)
                except httpx2.HTTPError:
                    self.lost[request] = None
                    return
                if not told.get("usage"):
                    self.lost[request] = told
                    return
                usage = told["usage"]
                cached = usage["prompt_tokens_details"]["cached_tokens"]
                self.done[request] = usage["prompt_tokens"], cached, usage["completion_tokens"]

    def _stream(self, http, body, headers, request):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        told = {}
        with http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    return told
                if line.startswith("data: "):
                    self.begun.add(request)
                    told = json.loads(line[6:])
                elif line.startswith("{"):
                    told = json.loads(line)
        return told


def check(path, clients):
    """Hold the ledger to what clients were told."""
    found = rows(path)
    for request, tokens in clients.done.items():
        assert found[request] == (*tokens, 200)
    assert clients.begun <= set(found)
    return found


def test_a_killed_server_has_billed_all_that_was_answered_and_nothing_twice(checkpoint, cache, tmp_path):
    path = str(tmp_path / "usage.db")
    for life in range(2):
        with serving(checkpoint, f"--ledger={path}") as (process, url, _):
            clients = Clients(url, f"{life}-")
            wait_for(lambda clients=clients: len(clients.done) >= 5)
            time.sleep(random.random())
            process.send_signal(signal.SIGKILL)
            clients.join()
        found = check(path, clients)
        interrupted = [request for request in found if found[request][3] == OPEN and request.startswith(f"{life}-")]
        # At most what each client was waiting for; of these the prompt counts.
        assert set(interrupted) <= set(clients.lost)
        assert all(found[request][0] > 0 and found[request][2] == 0 for request in interrupted)
    (total,) = totals(path)
    assert total.requests == len(found)
    assert total.unfinished == sum(status == OPEN for *_, status in found.values())


def test_sigterm_during_streams_ends_cleanly_with_an_exact_ledger(checkpoint, cache, tmp_path):
    path = str(tmp_path / "usage.db")
    with serving(checkpoint, f"--ledger={path}", "--drain_seconds=0.05") as (process, url, _):
        clients = Clients(url)
        wait_for(lambda: len(clients.done) >= 5)
        process.send_signal(signal.SIGTERM)
        clients.join()
        assert process.wait(PATIENCE) == 0
    found = check(path, clients)
    assert not [request for request, (*_, status) in found.items() if status == OPEN]
    told = [words["error"]["code"] for words in clients.lost.values() if words]
    assert set(told) <= {"shutting_down"}


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(str(tmp_path / "usage.db"))
    yield ledger
    with contextlib.suppress(Exception):
        ledger.close()


def test_a_step_that_fails_is_billed_for_what_there_was_before(llm, ledger, tmp_path, monkeypatch):
    step, count = llm.engine.step, itertools.count()

    def failing():
        if next(count) == 40:
            raise RuntimeError("out of memory")
        return step()

    monkeypatch.setattr(llm.engine, "step", failing)
    with running(llm, ledger=FileLedger(ledger)) as server:
        body = {"prompt": PROMPTS[0], "max_tokens": 100, "ignore_eos": True, "stream": True}
        lines = post(f"{server.url}/v1/completions", json=body, headers={"x-request-id": "s"}).text.split("\n\n")
        assert "error" in json.loads(lines[-2].removeprefix("data: "))
        # The row is there as soon as the client knows.
        prompt, _, generated, status = rows(str(tmp_path / "usage.db"))["s"]
        assert (prompt > 0, 30 < generated < 41, status) == (True, True, 200)
        # A whole answer that fails says so in its row.
        count = itertools.count(20)
        whole = post(f"{server.url}/v1/completions", json=body | {"stream": False}, headers={"x-request-id": "w"})
        assert whole.status_code == 500
        assert rows(str(tmp_path / "usage.db"))["w"][3] == 500


def test_nothing_is_answered_that_cannot_be_written_down(llm, ledger, tmp_path):
    with running(llm, ledger=FileLedger(ledger)) as server:
        body = {"model": NAME, "prompt": "a", "max_tokens": 4}
        assert post(f"{server.url}/v1/completions", json=body).status_code == 200
        other = sqlite3.connect(tmp_path / "usage.db", isolation_level=None)
        other.execute("ALTER TABLE requests RENAME TO elsewhere")
        refused = post(f"{server.url}/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "ledger_failed")
        lines = post(f"{server.url}/v1/completions", json=body | {"stream": True}).text.split("\n\n")
        assert json.loads(lines[0].removeprefix("data: "))["error"]["code"] == "ledger_failed"
        other.execute("ALTER TABLE elsewhere RENAME TO requests")
        other.close()
        assert post(f"{server.url}/v1/completions", json=body).status_code == 200
    wait_for(lambda: server.runner.stats.used_pages == 0)


def test_answers_that_fill_all_pages_are_complete(llm):
    """All are admitted, and grow until they give up pages for one another."""
    before = llm.engine.stats()
    room = llm.engine.group_tokens
    prompts = [[3 + (index * 7 + place) % 200 for place in range(20)] for index in range(30)]
    body = {"prompt": prompts, "max_tokens": room // 25, "seed": 3, "ignore_eos": True}
    with running(llm) as server:
        found = post(f"{server.url}/v1/completions", json=body).json()["choices"]
        alone = post(f"{server.url}/v1/completions", json=body | {"prompt": prompts[29]}).json()["choices"]
        too_long = post(f"{server.url}/v1/completions", json=body | {"max_tokens": room})
    assert [choice["finish_reason"] for choice in found] == ["length"] * 30
    assert found[29]["text"] == alone[0]["text"]
    assert llm.engine.stats().preemptions > before.preemptions and llm.engine.stats().used_pages == 0
    assert (too_long.status_code, too_long.json()["error"]["param"]) == (400, "max_tokens")
