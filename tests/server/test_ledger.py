"""The ledger: nothing lost, nothing twice, whatever happens to the process."""

import datetime
import os
import pathlib
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from ernie_jax.errors import UserError
from ernie_jax.server.ledger import OPEN, Entry, Ledger, Prices, Total, totals

NOON = datetime.datetime(2026, 11, 1, 12, tzinfo=datetime.UTC).timestamp()
DAY = 24 * 60 * 60


def entry(key="alice", at=NOON, prompt=10, cached=0, generated=1, request_id="r", status=200):
    return Entry(at, request_id, key, "ernie", "/v1/completions", prompt, cached, generated, status)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "a ledger?#.sqlite")


def rows(path):
    database = sqlite3.connect(path)
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    found = database.execute("SELECT * FROM requests ORDER BY rowid").fetchall()
    database.close()
    return found


def test_rows_are_what_was_recorded(path):
    ledger = Ledger(path)
    given = entry(prompt=7, cached=4, generated=3, request_id="req-'\"\n", status=499)
    assert ledger.record(given).result() == 1
    ledger.close()
    ledger.close()
    assert rows(path) == [(NOON, "req-'\"\n", "alice", "ernie", "/v1/completions", 7, 4, 3, 499)]
    with pytest.raises(RuntimeError, match="closed"):
        ledger.record(given)
    ledger = Ledger(path)  # goes on where it was
    ledger.record(given)
    ledger.close()
    assert len(rows(path)) == 2


def test_exact_under_many_threads(path):
    ledger = Ledger(path)
    threads, each = 32, 200

    def work(number):
        for index in range(each):
            written = ledger.record(
                entry(f"key-{number % 4}", prompt=index, cached=number, request_id=f"{number}-{index}")
            )
            if index % 50 == 0:
                written.result()

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        assert sum(total.requests for total in totals(path)) <= threads * each  # reading disturbs nobody
    ledger.close()
    assert len({row[1] for row in rows(path)}) == len(rows(path)) == threads * each
    prompt = sum(range(each)) * threads // 4
    count = threads // 4 * each
    expected = [
        Total(f"key-{key}", None, count, 0, prompt, each * sum(range(key, threads, 4)), count) for key in range(4)
    ]
    assert totals(path) == expected


def test_closing_while_others_record_loses_nothing_that_was_taken(path):
    ledger, taken = Ledger(path), []

    def work(number):
        try:
            for index in range(10_000):
                ledger.record(entry(request_id=f"{number}-{index}"))
                taken.append(f"{number}-{index}")
        except RuntimeError:
            pass

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    time.sleep(0.02)
    ledger.close()
    for worker in workers:
        worker.join()
    assert sorted(row[1] for row in rows(path)) == sorted(taken)


def test_an_entry_takes_the_place_of_an_earlier_one(path):
    ledger, lock = Ledger(path), sqlite3.connect(path, isolation_level=None)
    before = [ledger.record(entry(request_id=str(index), status=OPEN)) for index in range(3)]
    before[2].result()
    lock.execute("BEGIN IMMEDIATE")  # so that what follows is one transaction
    ledger.record(entry(request_id="x"))
    time.sleep(0.1)
    ledger.record(entry(request_id="1", generated=5), before[1])
    new = ledger.record(entry(request_id="3", status=OPEN))
    newer = ledger.record(entry(request_id="3", generated=6, status=499), new)
    (total,) = totals(path)
    assert (total.requests, total.unfinished) == (3, 3)
    lock.execute("COMMIT")
    lock.close()
    assert new.result() == newer.result() == 5
    lost = ledger.record(entry(request_id="\ud800", status=OPEN))
    assert isinstance(lost.exception(), UnicodeEncodeError)
    assert ledger.record(entry(request_id="4", generated=7), lost).result() == 6
    with pytest.raises(UserError, match="1 requests"):
        ledger.close()
    assert [(row[1], *row[-2:]) for row in rows(path)] == [
        *(("0", 1, OPEN), ("1", 5, 200), ("2", 1, OPEN)),
        *(("x", 1, 200), ("3", 6, 499), ("4", 7, 200)),
    ]
    (total,) = totals(path)
    assert (total.requests, total.unfinished) == (6, 2)


WRITER = """
import itertools, sys, threading
from ernie_jax.server.ledger import OPEN, Entry, Ledger
ledger, lock = Ledger(sys.argv[1]), threading.Lock()

def work(number):
    for index in itertools.count():
        name = f"{sys.argv[2]}-{number}-{index}"
        ledger.record(Entry(0.0, name, "k", "m", "e", index, 0, 1, 200)).result()
        with lock:
            print(name, flush=True)

for number in range(8):
    threading.Thread(target=work, args=(number,)).start()
"""


def test_exact_after_the_writer_is_killed(path):
    said = []
    for life in range(3):
        command = [sys.executable, "-c", WRITER, path, str(life)]
        root = pathlib.Path(__file__).parents[2]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
        said.append(writer.stdout.readline())
        time.sleep(random.random() / 2)
        os.kill(writer.pid, signal.SIGKILL)
        said += [line for line in writer.communicate()[0].splitlines(keepends=True) if line.endswith("\n")]
        # The log that the dead process left behind is part of what is read.
        assert sum(total.requests for total in totals(path)) >= len(said)
    said = [line.strip() for line in said]
    found = [row[1] for row in rows(path)]
    assert len(set(found)) == len(found) and set(said) <= set(found)
    # All that is there and was not said: at most the one row that each of the 8 threads was waiting for.
    assert len(found) - len(said) <= 3 * 8


def test_a_failure_reaches_who_recorded_and_who_closes(path, monkeypatch):
    ledger = Ledger(path)
    ledger.record(entry()).result()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("DROP TABLE requests")
    failed = ledger.record(entry())
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        failed.result()
    with pytest.raises(UserError, match="1 requests could not be recorded .*no such table"):
        ledger.close()
    other.close()


def test_a_row_that_cannot_be_written_spoils_no_other(path):
    ledger = Ledger(path)
    lock = sqlite3.connect(path, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")  # holds the thread, so that the next ones make one batch
    first = ledger.record(entry(request_id="first"))
    time.sleep(0.1)
    written = [ledger.record(entry(request_id=name)) for name in ("good", "\ud800", "fine")]
    missing = ledger.record(entry(key=None))
    lock.execute("COMMIT")
    lock.close()
    assert [row.result() for row in (first, written[0], written[2])] == [1, 2, 3]
    with pytest.raises(UnicodeEncodeError):
        written[1].result()
    with pytest.raises(sqlite3.IntegrityError):
        missing.result()
    with pytest.raises(UserError, match="2 requests"):
        ledger.close()
    assert [row[1] for row in rows(path)] == ["first", "good", "fine"]


def test_waiting_in_vain_takes_no_row_along(path):
    ledger = Ledger(path)
    assert not ledger.record(entry()).cancel()
    ledger.close()
    assert len(rows(path)) == 1


def test_totals_by_key_and_day(path):
    ledger = Ledger(path)
    midnight = NOON - DAY / 2
    moments = (midnight - 0.001, midnight, NOON, midnight + DAY - 0.001, midnight + DAY, midnight + 3 * DAY)
    for index, moment in enumerate(moments):
        ledger.record(entry("bob", moment, prompt=10**index))
    ledger.record(entry("alice", NOON, prompt=100, cached=64, generated=7))
    ledger.close()
    alice = Total("alice", "2026-11-01", 1, 0, 100, 64, 7)
    assert totals(path, by_day=True) == [
        alice,
        Total("bob", "2026-10-31", 1, 0, 1, 0, 1),
        Total("bob", "2026-11-01", 3, 0, 1110, 0, 3),
        Total("bob", "2026-11-02", 1, 0, 10_000, 0, 1),
        Total("bob", "2026-11-04", 1, 0, 100_000, 0, 1),
    ]
    assert totals(path) == [Total("alice", None, 1, 0, 100, 64, 7), Total("bob", None, 6, 0, 111_111, 0, 6)]
    first = datetime.date(2026, 11, 1)
    assert [total.prompt_tokens for total in totals(path, since=first)] == [100, 111_110]
    assert totals(path, first, first, by_day=True) == [alice, Total("bob", "2026-11-01", 3, 0, 1110, 0, 3)]
    assert totals(path, since=datetime.date(2027, 1, 1)) == []


def test_prices():
    total = Total("alice", None, 1, 0, 3_000_000, 1_000_000, 500_000)
    assert total.cost(Prices()) == 0
    assert total.cost(Prices(input=2, output=4)) == pytest.approx(8)
    assert total.cost(Prices(input=2, output=4, cached=0.5)) == pytest.approx(6.5)
    assert total.cost(Prices(input=2, output=4, cached=0)) == pytest.approx(6)


def test_recent_requests(path):
    ledger = Ledger(path)
    now = time.time()
    for age in (90, 50, 5, -3):
        ledger.record(entry(at=now - age, prompt=age + 10, generated=2)).result()
    ages, keys, tokens = zip(*ledger.recent(60), strict=True)
    ledger.close()
    assert ages == (pytest.approx(50, abs=2), pytest.approx(5, abs=2), 0) and set(keys) == {"alice"}
    assert tokens == (62, 17, 9)


def test_files_that_are_no_ledger(tmp_path, path):
    (tmp_path / "text").write_text("no database, but long enough to be taken for one: " * 20)
    sqlite3.connect(tmp_path / "other").execute("CREATE TABLE requests (x)").connection.close()
    for name, words in (("text", "not a database"), ("other", "no ledger"), ("none/x", "unable to open")):
        with pytest.raises(UserError, match=f"{name}: .*{words}"):
            Ledger(str(tmp_path / name))
    for name, words in (("text", "not a database"), ("other", "no ledger"), ("none", "no such file")):
        with pytest.raises(UserError, match=f"{name}: .*{words}"):
            totals(str(tmp_path / name))
    assert not (tmp_path / "none").exists()
