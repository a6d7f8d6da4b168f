"""A server over the embedded model, in a thread of its own, and OpenAI's clients of it."""

import asyncio
import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import openai
import pytest

from convert import convert
from ernie_jax.llm import LLM
from ernie_jax.server.app import App
from ernie_jax.server.hooks import NoLedger, NoMetrics
from ernie_jax.server.listen import Listener, bind
from ernie_jax.server.logs import Log
from ernie_jax.server.model import ServedModel
from ernie_jax.server.runner import Runner

ROOT = pathlib.Path(__file__).parents[2]
NAME = "ernie-embedded"
BODY_LIMIT = 200_000
# The embedded model's template knows no tools; its tokenizer has no tags, so that they are plain text.
TEMPLATE = """{%- for message in messages -%}
{{ message.role }}: {{ message.content or '' }}{{ message.tool_calls or '' }}
{% endfor %}{% if tools %}{{ tools | tojson }} Call with <tool_call>.
{% endif %}assistant: """


class KeptLog(Log):
    """Keep what would be written."""

    def __init__(self):
        self.lines = []

    def request(self, *args, **fields):
        self.lines.append((args, fields))


class Ledger(NoLedger):
    """Keep what was used."""

    def __init__(self):
        self.entries = {}

    def record(self, caller, request_id, endpoint, model, usage, status, replaces=None):
        assert (request_id in self.entries) == (replaces is not None)
        self.entries[request_id] = caller.name, endpoint, model, usage, status
        row = Future()
        row.set_result(len(self.entries))
        return row


class Metrics(NoMetrics):
    """Keep what is observed."""

    def __init__(self):
        self.first_tokens, self.tokens, self.stats = [], [], None

    def observe_first_token(self, seconds):
        self.first_tokens.append(seconds)

    def observe_token(self, seconds):
        self.tokens.append(seconds)

    def set_stats(self, stats):
        self.stats = stats

    def render(self):
        return "text/plain; version=0.0.4; charset=utf-8", f"running {self.stats.running}\n".encode()


@dataclasses.dataclass
class Server:
    """A running server, and its inside."""

    url: str
    runner: Runner
    listener: Listener
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    log: KeptLog
    ledger: Ledger
    metrics: Metrics

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    @property
    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


@contextlib.contextmanager
def running(
    llm: LLM,
    drain_seconds: float = 5.0,
    max_waiting: int = 64,
    host: str = "127.0.0.1",
    tls: tuple[str, str] | None = None,
    **options,
) -> Iterator[Server]:
    """Run a server over a model; tls is the files of a certificate and its key."""
    log, ledger, metrics = KeptLog(), Ledger(), Metrics()
    started = threading.Event()
    found = []

    async def serve():
        runner = Runner(llm.engine, max_waiting)
        app = App(ServedModel(llm, NAME), runner, **{"log": log, "ledger": ledger, "metrics": metrics} | options)
        certificate, key = tls or (None, None)
        listener = Listener(app, runner, drain_seconds, certificate=certificate, key=key)
        socket = bind(host, 0)
        address = f"[{host}]" if ":" in host else host
        url = f"http{'s' if tls else ''}://{address}:{socket.getsockname()[1]}"
        found.append(Server(url, runner, listener, asyncio.get_running_loop(), thread, log, ledger, metrics))
        task = asyncio.create_task(listener.serve([socket]))
        while not listener.started and not task.done():
            await asyncio.sleep(0.01)
        started.set()
        await task

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(60)
    server = found[0]
    try:
        yield server
    finally:
        if not server.loop.is_closed():
            with contextlib.suppress(RuntimeError):
                server.loop.call_soon_threadsafe(setattr, server.listener, "should_exit", True)
        thread.join()


@contextlib.contextmanager
def serving(checkpoint: pathlib.Path, *flags: str) -> Iterator[tuple[subprocess.Popen, str, list[str]]]:
    """Run the command; yields the process, its URL and the lines of its stderr, to which more come until the end."""
    command = [sys.executable, "main.py", "serve", f"--model={checkpoint}", "--port=0", "--name=small", *flags]
    command += ["--dtype=float32", "--cache_tokens=4096", "--max_sequences=4", "--nowarm_up"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "XLA_FLAGS": ""}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        lines: list[str] = []
        while not (lines and lines[-1].startswith("curl ")):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        drain = threading.Thread(target=lines.extend, args=(process.stderr,))  # a full pipe would stop the server
        drain.start()
        yield process, lines[-2].split()[-1], lines  # the last word is the chat page's address
    finally:
        process.kill()
        process.wait()
    drain.join()
    process.stderr.close()


@pytest.fixture(scope="module", autouse=True)
def compiling(quick_compiling):
    pass


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    """The embedded model, converted, with a chat template that knows tools."""
    directory = tmp_path_factory.mktemp("served") / NAME
    convert(str(ROOT / "models" / "ernie-embedded"), str(directory))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="session")
def llm(checkpoint, cache) -> LLM:
    """The model in float32, so that no answer depends on what else is in the batch."""
    return LLM.load(
        checkpoint, "float32", max_sequences=32, cache_tokens=4096, page_size=16, prefill_chunk=64, mixed_chunk=64
    )


@pytest.fixture(scope="session")
def server(llm) -> Iterator[Server]:
    with running(llm, body_limit=BODY_LIMIT, origins=["https://example.org"]) as server:
        yield server


@pytest.fixture(scope="session")
def client(server) -> openai.OpenAI:
    return server.client
