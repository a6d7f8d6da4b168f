"""Time a server as its users see it, and the engine under it without HTTP, in the same process.

    python -m benchmarks.serve --model=checkpoints/21b
    python -m benchmarks.serve --model=ernie-4.5-21b-a3b --random_weights --tokenizer=models/ernie-embedded --json=FILE
    python -m benchmarks.serve --url=http://127.0.0.1:8000 --cases=64x1024x1024 --rate=4

With --model it serves that itself; clients are another process. A case is STREAMSxPROMPTxOUTPUT: so many requests of
so many random tokens, greedy, that go on to their full length. They come all at once, or with --rate as a Poisson
process whether earlier ones are done or not. `floor` is what the weights, keys and values that must be read, and the
operations, take at this device's measured rates: all prompts in one step, then one step a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from absl import app, flags, logging

from benchmarks.streams import Case, Timing, summarize
from ernie_jax.cli import models
from ernie_jax.cli.command import UsageError
from ernie_jax.errors import UserError

models.define_model_flags(flags.FLAGS)
flags.DEFINE_string("tokenizer", None, "a model's directory whose tokenizer goes with --random_weights")
flags.DEFINE_integer("seed", 0, "draws --random_weights, the prompts and the arrivals")
_CASES = ["1x1024x1024", "16x1024x1024", "64x1024x1024", "256x1024x1024", "16x8192x1024"]
_URL = flags.DEFINE_string("url", None, "a server that runs already; $OPENAI_API_KEY is its key")
_CASE = flags.DEFINE_list("cases", _CASES, "STREAMSxPROMPTxOUTPUT, each a row")
_RATE = flags.DEFINE_float("rate", 0.0, "requests a second; 0: all at once", 0.0)
_REPEATS = flags.DEFINE_integer("repeats", 1, "times that each case runs, of which the quickest counts", 1)
_VOCABULARY = flags.DEFINE_integer("vocabulary", 1000, "with --url: prompts are of ids below", 4)
_LEDGER = flags.DEFINE_string("ledger", None, "let the server write this ledger")
_JSON = flags.DEFINE_string("json", None, "a file for all figures")
_PATIENCE = 3600  # seconds

_HEADER = (
    f"{'streams x in / out':<20}{'':<8}{'tok/s':>9}{'TTFT mean':>11}{'p50':>9}{'p99 ms':>9}"
    f"{'TPOT p50':>10}{'p99 ms':>9}{'gap p99':>9}{'of floor':>10}{'HTTP/engine':>13}"
)


def main(_) -> None:
    values = flags.FLAGS
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # as main.py does, for the same room in the cache
    logging.set_verbosity(logging.WARNING)  # Orbax reports every load
    try:
        cases = [_case(text) for text in _CASE.value]
        if (_URL.value is None) == (values.model is None):
            raise UsageError("give either --url or --model")
        found = _measure_url(cases) if _URL.value else _measure_model(values, cases)
    except (UserError, UsageError) as error:
        sys.exit(f"error: {error}")
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(found, indent=1) + "\n")


def _case(text: str) -> Case:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--cases={text}: write STREAMSxPROMPTxOUTPUT, as 16x1024x1024")
    return Case(*map(int, parts), rate=_RATE.value, seed=flags.FLAGS.seed)


def _measure_url(cases: list[Case]) -> dict[str, Any]:
    rows = []
    print(_HEADER)
    for case in cases:
        rows.append({"case": dataclasses.asdict(case), "http": _http(_URL.value, case, _VOCABULARY.value)})
        _print(case, "HTTP", rows[-1]["http"])
    return {"url": _URL.value, "rows": rows}


def _measure_model(values: flags.FlagValues, cases: list[Case]) -> dict[str, Any]:
    import jax

    from ernie_jax.bench import drive, report
    from ernie_jax.bench.machine import measure_machine

    device = jax.local_devices()[0]
    machine = measure_machine(device)
    most = max(case.streams for case in cases)
    llm = models.load(values, max_sequences=most)
    start = time.monotonic()
    longest = max(case.prompt + case.output for case in cases)
    llm.engine.warm_up([drive.greedy(1)], context=longest)
    print(f"{device.device_kind} · {report.describe_machine(machine)} · warm-up {time.monotonic() - start:.1f} s")
    print(_HEADER)
    rows, seeds = [], itertools.count(values.seed)
    with _serving(llm, most) as (url, call):
        for case in cases:
            row: dict[str, Any] = {"case": dataclasses.asdict(case)}
            for _ in range(_REPEATS.value):  # one after the other, so that a varying machine is fair to both
                # Other prompts every time: those that were seen are cached.
                once, again = (dataclasses.replace(case, seed=next(seeds)) for _ in range(2))
                bare = call(lambda engine, case=once: _bare(engine, case))
                http = _http(url, again, llm.engine.valid_vocab)
                for name, new in (("engine", bare), ("http", http)):
                    if name not in row or new["seconds"] < row[name]["seconds"]:
                        row[name] = new
            ratio = row["http_of_engine"] = row["engine"]["seconds"] / row["http"]["seconds"]
            row["floor_seconds"] = floor = _floor(llm, case, machine)
            _print(case, "engine", row["engine"], floor)
            _print(case, "HTTP", row["http"], floor, ratio)
            rows.append(row)
    about = {"model": values.model, "device": device.device_kind, "devices": llm.layout.mesh.size}
    about |= {"jax": jax.__version__, "dtype": str(llm.engine.dtype), "ops": llm.engine.describe_ops()}
    return about | {"machine": vars(machine), "rows": rows}


@contextlib.contextmanager
def _serving(llm, max_waiting: int) -> Iterator[tuple]:
    """Serve a model; yields the URL, and a function that calls another with the engine in the engine's thread."""
    from ernie_jax.server.app import App
    from ernie_jax.server.hooks import FileLedger
    from ernie_jax.server.ledger import Ledger
    from ernie_jax.server.listen import Listener, bind
    from ernie_jax.server.logs import Log
    from ernie_jax.server.metrics import Metrics
    from ernie_jax.server.model import ServedModel
    from ernie_jax.server.runner import Runner

    started: Future[asyncio.AbstractEventLoop] = Future()

    class Started(Listener):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            started.set_result(asyncio.get_running_loop())

    async def asked(function):
        return await runner.call(function)

    with contextlib.ExitStack() as stack:
        log = Log(stack.enter_context(open(os.devnull, "w")))
        ledger = None
        if _LEDGER.value:
            file = Ledger(_LEDGER.value)
            stack.callback(file.close)
            ledger = FileLedger(file)
        runner = Runner(llm.engine, max_waiting)
        app = App(ServedModel(llm, "model"), runner, metrics=Metrics(), log=log, ledger=ledger)
        listener = Started(app, runner, drain_seconds=0)
        socket = bind("127.0.0.1", 0)
        factory = listener.config.get_loop_factory()
        thread = threading.Thread(target=lambda: asyncio.run(listener.serve([socket]), loop_factory=factory))
        thread.start()
        stack.callback(thread.join)
        loop = started.result(_PATIENCE)
        stack.callback(lambda: loop.call_soon_threadsafe(listener.end))
        url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        yield url, lambda function: asyncio.run_coroutine_threadsafe(asked(function), loop).result(_PATIENCE)


def _bare(engine, case: Case) -> dict[str, float]:
    """Run a case through the engine alone."""
    from ernie_jax.bench import drive

    due = list(zip(case.arrivals(), case.prompts(engine.valid_vocab), strict=True))[::-1]
    times: dict[int, tuple[float, list[float]]] = {}
    begun = time.perf_counter()
    while due or engine.has_work:
        while due and due[-1][0] <= time.perf_counter() - begun:
            arrival, prompt = due.pop()
            times[engine.submit(prompt, drive.greedy(case.output))] = begun + arrival, []
        events = engine.step()
        now = time.perf_counter()
        for event in events:
            times[event.request][1].append(now)
        if due and not engine.has_work:
            time.sleep(max(0.0, due[-1][0] - (time.perf_counter() - begun)))
    return summarize([Timing(arrival, found, len(found)) for arrival, found in times.values()])


def _http(url: str, case: Case, vocabulary: int) -> dict[str, float]:
    """Run a case through HTTP, from another process."""
    asked = dataclasses.asdict(case) | {"url": url, "vocabulary": vocabulary}
    command = [sys.executable, "-m", "benchmarks.streams", json.dumps(asked)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    if result.returncode:
        raise UserError(result.stderr.strip().splitlines()[-1])
    return json.loads(result.stdout)


def _floor(llm, case: Case, machine) -> float:
    """Return the least seconds of a case: all prompts at once, then a step a token."""
    from ernie_jax.bench.measure import Decode, Prefill

    decode = Decode(case.streams, case.prompt, 0, case.output)
    steps = (Prefill(case.streams, case.prompt), 1), (decode, case.output - 1)
    seconds = 0.0
    for step, times in steps:
        cost = step.cost(llm.engine, llm.layout)
        seconds += times * machine.floor(cost.weights + cost.cache, cost.flops)[0]
    return seconds


def _print(case: Case, kind: str, found: dict, floor: float | None = None, ratio: float | None = None) -> None:
    ms = {name: value * 1e3 for name, value in found.items()}
    name = f"{case.streams} x {case.prompt} / {case.output}"
    print(
        f"{name:<20}{kind:<8}{found['output_tokens_per_second']:>9,.0f}{ms['mean_time_to_first_token']:>11,.1f}"
        f"{ms['time_to_first_token_p50']:>9,.1f}{ms['time_to_first_token_p99']:>9,.1f}"
        f"{ms['time_per_token_p50']:>10.2f}{ms['time_per_token_p99']:>9.2f}{ms['gap_p99']:>9.2f}"
        + (f"{floor / found['seconds']:>10.1%}" if floor else "")
        + (f"{ratio:>13.1%}" if ratio else ""),
        flush=True,
    )


if __name__ == "__main__":
    app.run(main)
