"""usage."""

import datetime
import json

import pytest

from ernie_jax.server.ledger import OPEN, Entry, Ledger


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("ledger") / "ledger.sqlite")
    book = Ledger(path)
    for day, key, prompt, cached, generated, status in (
        (1, "bob", 1_000_000, 0, 500_000, 200),
        (2, "alice", 40, 32, 10, 200),
        (3, "bob", 2_000_000, 1_000_000, 0, OPEN),
    ):
        time = datetime.datetime(2026, 11, day, 9, tzinfo=datetime.UTC).timestamp()
        book.record(Entry(time, "r", key, "m", "/v1/completions", prompt, cached, generated, status))
    book.close()
    return path


def table(result):
    assert (result.code, result.err) == (0, "")
    return [line.split() for line in result.out.splitlines()]


def test_a_row_a_key(run, ledger):
    result = run("usage", f"--ledger={ledger}")
    assert table(result) == [
        ["key", "requests", "unfinished", "prompt", "cached", "generated"],
        ["alice", "1", "0", "40", "32", "10"],
        ["bob", "2", "1", "3,000,000", "1,000,000", "500,000"],
        ["total", "3", "1", "3,000,040", "1,000,032", "500,010"],
    ]
    assert len({len(line) for line in result.out.splitlines()}) == 1


def test_cost(run, ledger):
    rows = table(run("usage", f"--ledger={ledger}", "--price_input=2", "--price_output=4"))
    assert [row[-1] for row in rows] == ["cost", "0.0001", "8.0000", "8.0001"]
    prices = ("--price_input=2", "--price_cached=0.5", "--price_output=4")
    assert [row[-1] for row in table(run("usage", f"--ledger={ledger}", *prices))][2] == "6.5000"


def test_days(run, ledger):
    rows = table(run("usage", f"--ledger={ledger}", "--by_day", "--since=2026-11-02", "--until=2026-11-03"))
    assert [row[:3] for row in rows[1:3]] == [["alice", "2026-11-02", "1"], ["bob", "2026-11-03", "1"]]
    assert rows[3] == ["total", "2", "1", "2,000,040", "1,000,032", "10"]
    assert table(run("usage", f"--ledger={ledger}", "--since=2026-12-01")) == [["no", "requests"]]


def test_json(run, ledger):
    result = run("usage", f"--ledger={ledger}", "--json", "--price_input=1", "--since=2026-11-03")
    assert json.loads(result.out) == {
        "key": "bob",
        "requests": 1,
        "unfinished": 1,
        "prompt_tokens": 2_000_000,
        "cached_tokens": 1_000_000,
        "generated_tokens": 0,
        "cost": 2.0,
    }
    days = run("usage", f"--ledger={ledger}", "--json", "--by_day").out.splitlines()
    assert [json.loads(line)["day"] for line in days] == ["2026-11-02", "2026-11-01", "2026-11-03"]
    assert run("usage", f"--ledger={ledger}", "--json", "--since=2026-12-01").out == ""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "give --ledger"),
        (["--ledger=LEDGER", "--since=yesterday"], 2, "--since=yesterday: write a day as 2026-11-01"),
        (["--ledger=LEDGER", "--until=2026-02-30"], 2, "--until=2026-02-30"),
        (["--ledger=LEDGER", "--price_input=-1"], 2, "price_input"),
        (["--ledger=nowhere.sqlite"], 1, "nowhere.sqlite: no such file"),
    ],
)
def test_bad_usage(run, ledger, arguments, code, words):
    result = run("usage", *(argument.replace("LEDGER", ledger) for argument in arguments))
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith("error: ") and result.err.count("\n") == 1 and words in result.err
