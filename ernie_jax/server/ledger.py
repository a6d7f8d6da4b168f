"""The ledger: one row a request in a SQLite file, and what its tokens cost."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import pathlib
import queue
import sqlite3
import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import Future
from typing import NamedTuple

from ernie_jax.errors import UserError

_APPLICATION = 0x45524E49  # "ERNI", in the file's header
_BUSY_SECONDS = 30  # how long one waits for another's transaction
_BATCH = 1000  # rows of a transaction at most
OPEN = 0  # the status of a request without an end: it is running, or was interrupted by a killed process


@dataclasses.dataclass(frozen=True)
class Entry:
    """Record a request that has begun, is finished, or was cut off.

    Attributes:
      time: of its end, or its beginning if it is open, in seconds since 1970.
      key: the name of the caller's key.
      prompt_tokens: all of them, of which `cached_tokens` were found in the prefix cache.
      status: of the response; 499 if the client left, OPEN if there is no end.
    """

    time: float
    request_id: str
    key: str
    model: str
    endpoint: str
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    status: int


_COLUMNS = tuple(field.name for field in dataclasses.fields(Entry))
_TYPES = {"float": "REAL", "str": "TEXT", "int": "INTEGER"}
_CREATE = ", ".join(f"{field.name} {_TYPES[field.type]} NOT NULL" for field in dataclasses.fields(Entry))
_PUT = f"INSERT OR REPLACE INTO requests (rowid, {', '.join(_COLUMNS)}) VALUES "
_PLACES = f"({', '.join('?' * (1 + len(_COLUMNS)))})"


Row = Future[int]  # the number of a row in the file, once it is written


class _Item(NamedTuple):
    entry: Entry
    replaces: Row | None
    row: Row


class Ledger:
    """Write entries from a thread of its own, all that wait in one transaction.

    Transactions are synchronous=FULL: once `record`'s future is done the row survives a killed process and a power cut
    alike. That costs a flush of the disk a transaction, which nobody but the thread waits for; NORMAL would lose the
    last rows to a power cut. One server writes to a file; `totals` may read it meanwhile.

    Raises:
      UserError: if the file can't be opened, or is something else.
    """

    def __init__(self, path: str):
        self._path = path
        with _explained(path):
            self._database = sqlite3.connect(path, _BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            try:
                _prepare(self._database, path)
            except BaseException:
                self._database.close()
                raise
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # nothing comes after the None that ends the queue
        self._closed = False
        self._lost, self._error = 0, ""
        self._thread = threading.Thread(target=self._write, name="ledger", daemon=True)
        self._thread.start()

    def record(self, entry: Entry, replaces: Row | None = None) -> Row:
        """Queue an entry, from any thread, without waiting.

        Args:
          replaces: what an earlier call returned: the entry takes that row's place, so that a request has only one.

        Returns:
          A future that is done when the row is on the disk; it fails with the error if it can't be written. Who waits
          for it before the last byte of the answer has a ledger that is exact whenever the process is killed.

        Raises:
          RuntimeError: after `close`.
        """
        row: Row = Future()
        row.set_running_or_notify_cancel()  # a waiter that is cancelled doesn't take its row along
        with self._gate:
            if self._closed:
                raise RuntimeError("the ledger is closed")
            self._queue.put(_Item(entry, replaces, row))
        return row

    def recent(self, seconds: float) -> list[tuple[float, str, int]]:
        """Return (age in seconds, key, tokens) of the requests that ended within the last seconds, oldest first."""
        now = time.time()
        query = (
            "SELECT max(? - time, 0), key, prompt_tokens + generated_tokens FROM requests WHERE time > ? ORDER BY time"
        )
        with _reading(self._path) as database:
            return database.execute(query, (now, now - seconds)).fetchall()

    def close(self) -> None:
        """Write what is queued and close the file.

        Raises:
          UserError: if any entry since the start could not be written.
        """
        with self._gate:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()
        if self._lost:
            raise UserError(f"{self._path}: {self._lost} requests could not be recorded ({self._error})")

    def _write(self) -> None:
        with contextlib.closing(self._database):
            more = True
            while more:
                batch = []
                item = self._queue.get()
                while item is not None:
                    batch.append(item)
                    if len(batch) == _BATCH or self._queue.empty():
                        break
                    item = self._queue.get()
                more = item is not None
                self._commit(batch)

    def _commit(self, batch: list[_Item]) -> None:
        try:
            self._database.execute("BEGIN IMMEDIATE")
            numbers = self._put(batch)
            self._database.execute("COMMIT")
        except Exception as error:
            with contextlib.suppress(sqlite3.Error):
                self._database.rollback()
            if len(batch) > 1 and not isinstance(error, sqlite3.OperationalError):
                # It is about some row, not about the disk: the others can do without it.
                for item in batch:
                    self._commit([item])
                return
            self._lost, self._error = self._lost + len(batch), str(error)
            for item in batch:
                item.row.set_exception(error)
        else:
            for row, number in numbers.items():
                row.set_result(number)

    def _put(self, batch: list[_Item]) -> dict[Row, int]:
        """Write rows in one statement, each in a new place or in that of the row that it replaces; returns the places.

        One, because after every statement the thread has to wait for its turn among the process's others.
        """
        (last,) = self._database.execute("SELECT coalesce(max(rowid), 0) FROM requests").fetchone()
        numbers: dict[Row, int] = {}
        rows: dict[int, tuple] = {}
        for item in batch:
            old = item.replaces
            number = numbers.get(old)
            if number is None and old and not old.exception():  # it is done: it stood before this one in the queue
                number = old.result()
            if number is None:
                number = last = last + 1
            numbers[item.row] = number
            rows[number] = number, *dataclasses.astuple(item.entry)
        statement = _PUT + ", ".join([_PLACES] * len(rows))
        self._database.execute(statement, [value for row in rows.values() for value in row])
        return numbers


@dataclasses.dataclass(frozen=True)
class Prices:
    """Price tokens, per million; None is the same as uncached input."""

    input: float = 0.0
    output: float = 0.0
    cached: float | None = None


@dataclasses.dataclass(frozen=True)
class Total:
    """Sum a key's requests, of one day (UTC, as 2026-11-01) or, where it is None, of all.

    Attributes:
      unfinished: of the requests, those without an end, of which only the prompts count.
    """

    key: str
    day: str | None
    requests: int
    unfinished: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int

    def cost(self, prices: Prices) -> float:
        cached = prices.input if prices.cached is None else prices.cached
        fresh = self.prompt_tokens - self.cached_tokens
        return (fresh * prices.input + self.cached_tokens * cached + self.generated_tokens * prices.output) / 1e6


def totals(
    path: str, since: datetime.date | None = None, until: datetime.date | None = None, by_day: bool = False
) -> list[Total]:
    """Sum a ledger up, by key and by day if wanted, in this order; also while a server writes to it.

    Args:
      since, until: the first and the last day (UTC); None is no bound.

    Raises:
      UserError: if the file is no ledger, or there is none.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f"{path}: no such file")
    query = f"""
        SELECT key, {"date(time, 'unixepoch')" if by_day else "NULL"} AS day,
          count(*), sum(status = {OPEN}), sum(prompt_tokens), sum(cached_tokens), sum(generated_tokens)
        FROM requests
        WHERE time >= ? AND time < ?
        GROUP BY key, day ORDER BY key, day"""
    bounds = (_midnight(since) if since else -math.inf, _midnight(until) + 24 * 60 * 60 if until else math.inf)
    with _reading(path) as database:
        return [Total(*row) for row in database.execute(query, bounds)]


def _midnight(day: datetime.date) -> float:
    return datetime.datetime.combine(day, datetime.time(), datetime.UTC).timestamp()


@contextlib.contextmanager
def _reading(path: str) -> Iterator[sqlite3.Connection]:
    """Open a ledger to read. Read only: it then can't move the log's rows into the file, which is the writer's work."""
    with _explained(path):
        quoted = urllib.parse.quote(str(pathlib.Path(path).absolute()))
        with contextlib.closing(sqlite3.connect(f"file:{quoted}?mode=ro", _BUSY_SECONDS, uri=True)) as database:
            _check(database, path)
            yield database


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise UserError(f"{path}: {error}") from None


def _prepare(database: sqlite3.Connection, path: str) -> None:
    """Set a connection up to write; make the table in a new file."""
    if database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        _check(database, path)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    # In one transaction, so that a process killed here leaves an empty file or a ledger.
    database.execute("BEGIN IMMEDIATE")
    database.execute(f"PRAGMA application_id = {_APPLICATION}")
    database.execute(f"CREATE TABLE IF NOT EXISTS requests ({_CREATE})")
    database.execute("CREATE INDEX IF NOT EXISTS requests_time ON requests (time)")
    database.execute("COMMIT")


def _check(database: sqlite3.Connection, path: str) -> None:
    if database.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
        raise UserError(f"{path}: a database, but no ledger of this server")
