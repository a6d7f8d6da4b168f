"""Load: many clients that stream, dawdle, leave, err and ask for too much, all at once.

Short by default. For hours of it, or 256 streams for five minutes:
ERNIE_LOAD_STREAMS=256 ERNIE_LOAD_SECONDS=300 python -m pytest -s tests/server/test_storm.py
"""

import asyncio
import dataclasses
import gc
import os
import pathlib
import sqlite3
import threading

import numpy as np

from ernie_jax.server.answers import Answers, Choice
from ernie_jax.server.hooks import FileLedger
from ernie_jax.server.ledger import Ledger
from ernie_jax.server.logs import Log
from ernie_jax.server.metrics import Metrics
from ernie_jax.server.runner import TokenStream
from tests.server.conftest import running
from tests.server.storm import Storm, questions
from tests.server.test_load import wait_for

STREAMS = int(os.environ.get("ERNIE_LOAD_STREAMS", "32"))
SECONDS = float(os.environ.get("ERNIE_LOAD_SECONDS", "4"))
LONG = 120  # seconds from which on memory tells something
GROWTH = 16 * 2**20  # bytes of a run that may come from the allocator


def resident():
    """Return the bytes of memory that the process has."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def alive():
    """Count what a request leaves behind if somebody keeps it."""
    gc.collect()
    return sum(kind in (TokenStream, Answers, Choice) for kind in map(type, gc.get_objects()))


def watch(over, found):
    while not over.wait(1):
        found.append(resident())


def test_a_storm(llm, tmp_path):
    seed = np.random.SeedSequence().entropy % 2**32
    print("seed", seed)
    if SECONDS >= LONG:  # programs take memory, too
        defaults = llm.sampling_params()
        kinds = ({"temperature": 0.0}, {"logprobs": True, "top_logprobs": 20}, {"presence_penalty": 1.0})
        biased = {"logit_bias": {0: 0.0}}
        params = [dataclasses.replace(defaults, **kind) for kind in ({"temperature": 1.0}, *kinds, biased)]
        llm.engine.warm_up(params, grammars=True)
    traces, others = llm.engine._step.traces, alive()
    before = llm.engine.stats()
    memory, over = [], threading.Event()
    path = str(tmp_path / "usage.db")
    ledger = Ledger(path)
    with (
        open(os.devnull, "w") as nowhere,
        running(llm, max_waiting=STREAMS, ledger=FileLedger(ledger), metrics=Metrics(), log=Log(nowhere)) as server,
    ):
        storm = Storm(int(server.url.rpartition(":")[2]), questions(21), seed)
        watcher = threading.Thread(target=watch, args=(over, memory))

        async def both():
            await storm.learn()
            watcher.start()
            await storm.blow(STREAMS, SECONDS)

        try:
            asyncio.run(both())
        finally:
            over.set()
        wait_for(lambda: server.runner.open == 0 and server.runner.stats.used_pages == 0)
        stats = llm.engine.stats()
        print(dict(storm.counts))
        print(stats)
        # Every page is back, and nothing else is kept of anyone.
        assert stats.running == stats.waiting == 0 and not llm.engine.has_work
        assert stats.free_pages + stats.cached_pages == before.free_pages + before.cached_pages + before.used_pages
        assert not server.runner._streams and not server.runner._requests
    watcher.join()
    ledger.close()
    # Who was answered was written down once, with what the answer said of itself.
    query = "SELECT request_id, prompt_tokens, cached_tokens, generated_tokens FROM requests WHERE status = 200"
    rows = [row for row in sqlite3.connect(path).execute(query) if row[0] in storm.usage]
    assert {request: tuple(tokens) for request, *tokens in rows} == storm.usage and len(rows) == len(storm.usage)
    assert alive() <= others
    ways = {"whole", "stream", "slowly", "leave_stream", "leave_whole", "leave_body", "malformed", "too_much", "late"}
    assert ways <= set(storm.counts)
    assert stats.cached_tokens > before.cached_tokens
    if SECONDS >= LONG:
        third = len(memory) // 3
        early, late = (float(np.median(part)) for part in (memory[third : 2 * third], memory[2 * third :]))
        print(f"memory: {early / 2**20:.1f} MiB in the second third, {late / 2**20:.1f} MiB in the last")
        more = llm.engine._step.traces - traces
        print([size >> 20 for size in memory[::10]], f"MiB every 10 s; {more} programs more")
        assert late < early + GROWTH
