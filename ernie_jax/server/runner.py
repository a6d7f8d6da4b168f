"""Runner: the thread that owns the Engine, and the streams through which coroutines get its tokens.

Coroutines put calls into the thread's inbox; it makes them between steps. After each step it hands all new tokens to
the event loop at once. Nothing else touches the engine but `check`, which only reads what never changes, and
`expert_load`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import queue
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import numpy as np

from ernie_jax import distributed
from ernie_jax.engine import Engine, Grammar, SamplingParams, Stats, TokenEvent
from ernie_jax.errors import UserError
from ernie_jax.server.protocol import ApiError

RETRY_SECONDS = 1
_MOST_FAILURES = 3  # steps in a row that fail before the server gives up
# How long the event loop's thread may keep the engine's waiting for the interpreter: a step's calls into JAX give it
# away several times, and each time it would wait for Python's 5 ms while hundreds of streams have something to send.
_SWITCH_SECONDS = 5e-4

_log = logging.getLogger(__name__)


class Job(NamedTuple):
    """A sequence to generate."""

    prompt: Sequence[int]
    params: SamplingParams
    grammar: Grammar | None = None
    include_routing: bool = False


class TokenStream:
    """The tokens of the sequences of one request: lists of (sequence's index, event), as they come.

    Iterate in the event loop's thread, and `close` in the end, whatever happens; it ends when all sequences have.

    Raises:
      ApiError: while iterating, if the request can't go on.
    """

    def __init__(self, runner: Runner, jobs: Sequence[Job]):
        self._runner = runner
        self.jobs = jobs
        self._left = set(range(len(jobs)))
        self._events: list[tuple[int, TokenEvent]] = []
        self._error: ApiError | None = None
        self._news = asyncio.Event()
        self._deadline: asyncio.TimerHandle | None = None

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> list[tuple[int, TokenEvent]]:
        while not self._events:
            if self._error:
                raise self._error
            if not self._left:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        events, self._events = self._events, []
        return events

    def cancel(self, index: int) -> None:
        """End one of the sequences; no more tokens of it come."""
        if index in self._left:
            self._runner._cancel(self, index)
            self._events = [event for event in self._events if event[0] != index]
            self._end(index)

    def close(self) -> None:
        """End all that has not ended."""
        for index in list(self._left):
            self.cancel(index)

    def _put(self, index: int, event: TokenEvent) -> None:
        if index in self._left:
            self._events.append((index, event))
            self._news.set()
            if event.finish_reason:
                self._end(index)

    def _fail(self, error: ApiError) -> None:
        if self._left:
            self._error = error
            self.close()
            self._news.set()

    def _end(self, index: int) -> None:
        self._left.remove(index)
        self._runner._count(-1)
        if not self._left:
            self._runner._alive.remove(self)
            if self._deadline:
                self._deadline.cancel()


class Runner:
    """Run an engine's steps in a thread of its own.

    Args:
      max_waiting: sequences beyond the engine's own number that may wait; more are refused.
      after_step: called in the thread after every step with the engine's Stats.

    Attributes:
      failure: of a step where other processes follow the engine: nobody knows how far they are with it, so it can't
        begin anew.
    """

    def __init__(self, engine: Engine, max_waiting: int, after_step: Callable[[Stats], None] = lambda stats: None):
        self._engine = engine
        self._capacity = engine.options.max_sequences + max_waiting
        self._after_step = after_step
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.stats = engine.stats()
        # Of the event loop's thread:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open = 0
        self._alive: set[TokenStream] = set()
        self._calls: set[asyncio.Future] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = self._abandoned = False
        # Of the engine's thread:
        self._streams: dict[int, tuple[TokenStream, int, _Guarded | None]] = {}
        self._requests: dict[tuple[TokenStream, int], int] = {}
        self._failures = 0
        self._stopping = False
        self.failure: Exception | None = None  # read by both, as the next
        self._broken: str | None = None  # read by both

    def start(self) -> None:
        """Start the thread; call it in the event loop that will iterate over the streams."""
        self._loop = asyncio.get_running_loop()
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._engine.freeze()
        self._thread.start()

    @property
    def refusal(self) -> ApiError | None:
        """Say why no request is taken now; None if there is room."""
        if self._broken:
            return ApiError(self._broken, code="engine_failed", status=503)
        if self._draining or not self._thread.is_alive():
            return ApiError("The server is shutting down; send the request to another.", None, "shutting_down", 503)
        return None

    @property
    def open(self) -> int:
        """How many sequences are running or waiting."""
        return self._open

    def check(self, job: Job) -> None:
        """Check a sequence without queueing it; raises UserError as Engine.check."""
        self._engine.check(job.prompt, job.params)

    def expert_load(self) -> np.ndarray | None:
        """Return the engine's counts of experts, as Engine.expert_load."""
        return self._engine.expert_load()

    def submit(self, jobs: Sequence[Job], priority: int = 0, timeout: float | None = None) -> TokenStream:
        """Queue the sequences of a request.

        Args:
          priority: the lowest number goes first.
          timeout: seconds after which the request fails.

        Raises:
          ApiError: if the server takes no requests, or too many are waiting.
        """
        if refusal := self.refusal:
            raise refusal
        if self._open + len(jobs) > self._capacity:
            raise ApiError(
                f"The server is busy: {self._open} of at most {self._capacity} answers are in the making; try again "
                "later.",
                code="overloaded",
                status=503,
                headers={"retry-after": str(RETRY_SECONDS)},
            )
        stream = TokenStream(self, jobs)
        self._count(len(jobs))
        self._alive.add(stream)
        self._inbox.put(functools.partial(self._begin, stream, priority))
        if timeout is not None:
            late = ApiError(f"The request took longer than {timeout:g} seconds.", None, "request_timeout", 408)
            stream._deadline = self._loop.call_later(timeout, stream._fail, late)
        return stream

    def call[T](self, function: Callable[[Engine], T]) -> Awaitable[T]:
        """Call a function with the engine, between steps.

        Raises:
          ApiError: as `submit`, if the server takes no requests.
        """
        if refusal := self.refusal:
            raise refusal
        future = self._loop.create_future()
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        self._inbox.put(functools.partial(self._answer, future, function))
        return future

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests from now on and wait for those that run; tells whether they ended in time."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        return self._open == 0

    def stop(self) -> None:
        """End the thread, and with an error what still runs."""
        self._draining = True
        self._inbox.put(self._stop)
        if not self._abandoned:
            self._thread.join()
        gc.unfreeze()

    def abandon(self, error: ApiError) -> None:
        """End all that runs with an error, and take no more, without the thread, which may hang in a step for good."""
        self._abandoned = True
        self._broken = str(error)
        for stream in list(self._alive):
            stream._fail(error)
        for future in self._calls:
            if not future.done():
                future.set_exception(error)

    def _count(self, change: int) -> None:
        self._open += change
        if self._open:
            self._idle.clear()
        else:
            self._idle.set()

    def _cancel(self, stream: TokenStream, index: int) -> None:
        self._inbox.put(functools.partial(self._drop, stream, index))

    # In the engine's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            working = self._engine.has_work and not self._broken
            try:
                command = self._inbox.get(block=not working)
                while True:
                    command()
                    command = self._inbox.get(block=False)
            except queue.Empty:
                pass
            if self._engine.has_work and not self._broken and not self._stopping:
                self._step()

    def _step(self) -> None:
        try:
            events = self._engine.step()
            self.stats = self._engine.stats()
        except Exception as error:
            self._recover(error)
            return
        self._after_step(self.stats)
        if not events:
            return
        self._failures = 0
        batch = []
        for event in events:
            if not (entry := self._streams.get(event.request)):
                continue
            stream, index, grammar = entry
            if event.finish_reason:
                self._forget(event.request)
            if grammar and grammar.error:
                batch.append(functools.partial(stream._fail, grammar.error))
            else:
                batch.append(functools.partial(stream._put, index, event))
        self._tell(lambda: [hand_out() for hand_out in batch])

    def _recover(self, error: Exception) -> None:
        """Fail everything that runs, and begin with an empty engine."""
        self._fail_all(ApiError("The server failed while it computed the answer; try again.", status=500))
        if distributed.process_count() > 1:
            self._broken, self.failure = "The server is out of order: a step has failed.", error
            return
        _log.error("a step failed", exc_info=error)
        self._failures += 1
        try:
            self._engine.reset()
            if self._failures >= _MOST_FAILURES:
                self._broken = f"The server is out of order: {self._failures} steps in a row have failed."
        except Exception as again:
            _log.error("the engine could not be reset", exc_info=again)
            self._broken = "The server is out of order: the engine could not begin anew after a failure."
        self.stats = self._engine.stats()

    def _begin(self, stream: TokenStream, priority: int) -> None:
        if self._stopping or self._broken:
            self._tell(functools.partial(stream._fail, self.refusal))
            return
        try:
            for index, job in enumerate(stream.jobs):
                grammar = _Guarded(job.grammar) if job.grammar else None
                request = self._engine.submit(
                    job.prompt,
                    job.params,
                    priority=priority,
                    grammar=grammar,
                    include_routing=job.include_routing,
                )
                self._streams[request] = stream, index, grammar
                self._requests[stream, index] = request
        except UserError as error:
            self._tell(functools.partial(stream._fail, ApiError.of(error)))

    def _drop(self, stream: TokenStream, index: int) -> None:
        if (request := self._requests.get((stream, index))) is not None:
            self._engine.cancel(request)
            self._forget(request)

    def _forget(self, request: int) -> None:
        stream, index, _ = self._streams.pop(request)
        del self._requests[stream, index]

    def _fail_all(self, error: ApiError) -> None:
        for stream in {stream for stream, _, _ in self._streams.values()}:
            self._tell(functools.partial(stream._fail, error))
        self._streams.clear()
        self._requests.clear()

    def _answer(self, future: asyncio.Future, function: Callable) -> None:
        try:
            settle = functools.partial(future.set_result, function(self._engine))
        except Exception as error:
            settle = functools.partial(future.set_exception, error)
        self._tell(lambda: None if future.done() else settle())

    def _stop(self) -> None:
        self._stopping = True
        self._fail_all(ApiError("The server was shut down before the answer was complete.", None, "shutting_down", 503))

    def _tell(self, function: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(function)


class _Guarded:
    """Keep a grammar's failure to its own request: a step serves all of them.

    Attributes:
      error: why it can't go on. Its sequence then ends with the next token.
    """

    def __init__(self, grammar: Grammar):
        self.error: ApiError | None = None
        self._grammar = grammar

    def mask(self, out: np.ndarray) -> None:
        try:
            self._grammar.mask(out)
        except Exception as error:
            self._fail(error)
            out[:] = -1

    def accept(self, token: int) -> bool:
        try:
            return self.error is None and self._grammar.accept(token)
        except Exception as error:
            self._fail(error)
            return False

    @property
    def free(self) -> bool:
        return self.error is None and self._grammar.free

    @property
    def finished(self) -> bool:
        return self.error is not None or self._grammar.finished

    def _fail(self, error: Exception) -> None:
        if isinstance(error, UserError):
            self.error = ApiError.of(error)
        else:
            _log.error("a grammar failed", exc_info=error)
            self.error = ApiError("The server failed while it followed the grammar of the answer.", status=500)
