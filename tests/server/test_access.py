"""Keys, rate limits and what callers are told."""

import asyncio
import hmac
import re
import time

import pytest

from ernie_jax.errors import UserError
from ernie_jax.server.access import Access, AccessError
from ernie_jax.server.keys import Keys
from ernie_jax.server.ledger import Entry, Ledger
from ernie_jax.server.limits import Bucket, duration

KEYS = "# team\nalice sk-alice # her laptop\n\nsk-nobody\n  bob\tsk-b#b  \nalice sk-alice-new\n"


class Clock:
    def __init__(self, now=1e6):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text(KEYS)
    return Keys.load(str(path), {})


def bearer(key):
    return {"Host": "x", "Authorization": f"Bearer {key}"}


def admit(access, key="sk-alice", tokens=0):
    return asyncio.run(access.admit(bearer(key), tokens))


def refused(access, *arguments, headers=None):
    with pytest.raises(AccessError) as caught:
        if headers is None:
            admit(access, *arguments)
        else:
            asyncio.run(access.admit(headers, 0))
    return caught.value


def test_keys_of_a_file(keys):
    assert len(keys) == 4
    assert [keys.find(key) for key in ("sk-alice", "sk-alice-new", "sk-b#b")] == ["alice", "alice", "bob"]
    assert re.fullmatch("key-[0-9a-f]{8}", keys.find("sk-nobody"))
    assert not any(map(keys.find, ("", "alice", "sk-alic", "sk-alice ", "SK-ALICE", "team", "é", "\ud800")))


def test_a_key_without_a_name_keeps_its_name_where_its_line_moves():
    one, other = Keys.load(None, {"ERNIE_API_KEYS": "sk-1,sk-2"}), Keys.load(None, {"ERNIE_API_KEYS": "sk-2,sk-1"})
    assert one.find("sk-1") == other.find("sk-1") != one.find("sk-2")


def test_keys_of_the_environment_come_on_top(tmp_path):
    path = tmp_path / "keys"
    path.write_text("alice sk-alice", encoding="utf-8-sig")
    keys = Keys.load(str(path), {"ERNIE_API_KEYS": "bob sk-bob, carol sk-carol\ndave sk-dave # was: eve, sk-eve"})
    found = [keys.find(f"sk-{name}") for name in ("alice", "bob", "carol", "dave", "eve")]
    assert found == ["alice", "bob", "carol", "dave", None]
    assert len(Keys.load(None, {})) == len(Keys.load(None, {"ERNIE_API_KEYS": ""})) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no API key in it"),
        ("# sk-secret\n", "no API key in it"),
        ("a b sk-secret", "line 1: write"),
        ("sk-1\nname sk-sécret", "line 2: write"),
        ("a sk-secret\n\nb sk-secret", "line 3: this key is there already"),
    ],
)
def test_bad_key_files_are_refused_without_showing_a_key(tmp_path, text, words):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        Keys.load(str(path), {})
    assert str(caught.value).startswith(str(path)) and "cret" not in str(caught.value)


def test_unreadable_keys(tmp_path):
    (tmp_path / "keys").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        Keys.load(str(tmp_path / "keys"), {})
    with pytest.raises(UserError, match="none: No such file"):
        Keys.load(str(tmp_path / "none"), {})
    with pytest.raises(UserError, match="ERNIE_API_KEYS: no API key"):
        Keys.load(None, {"ERNIE_API_KEYS": " , "})


def test_every_key_is_compared_whether_found_or_not(keys, monkeypatch):
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    for key in ("sk-alice", "sk-alice-new", "sk-wrong", "x" * 10_000):
        compared.clear()
        keys.find(key)
        assert len(compared) == len(keys)
        assert all(len(a) == len(b) == 32 for a, b in compared)


def test_keys_are_shown_nowhere(keys, clock):
    access = Access(keys, 1, None, None, clock)
    caller = admit(access)
    shown = [repr(keys), repr(access), repr(caller), repr(vars(keys)), repr(vars(access)), repr(caller.headers())]
    shown += [str(refused(access).body), str(refused(access, "sk-wrong").body)]
    assert not any("sk-" in text for text in shown)


def test_missing_and_wrong_keys(keys, clock):
    access = Access(keys, None, None, None, clock)
    for headers in ({}, {"Authorization": ""}, {"Authorization": "Bearer "}, {"authorization": "Basic sk-alice"}):
        error = refused(access, headers=headers)
        assert (error.status, error.code, error.type) == (401, "missing_api_key", "authentication_error")
        assert error.headers == {"www-authenticate": "Bearer"} and error.retry_after is None
    error = refused(access, "sk-wrong")
    assert (error.status, error.code) == (401, "invalid_api_key")
    for headers in ({"AUTHORIZATION": "bearer  sk-alice "}, {"authorization": "Bearer sk-alice"}):
        assert asyncio.run(access.admit(headers, 5)).name == "alice"


def test_without_keys_everybody_has_access_and_shares_the_limits(clock):
    access = Access(Keys(), 2, None, None, clock)
    assert admit(access, "whatever").name == asyncio.run(access.admit({}, 0)).name == "anonymous"
    assert refused(access, headers={}).status == 429


def test_without_limits_there_are_no_headers(keys, clock):
    assert admit(Access(keys, None, None, None, clock), tokens=10**9).headers() == {}


@pytest.mark.parametrize("limits", [(0, None), (None, 0), (-1, 5)])
def test_a_limit_of_nothing_is_refused(keys, limits):
    with pytest.raises(UserError, match="_per_minute=.*at least 1"):
        Access(keys, *limits)


def test_requests_a_minute(keys, clock):
    access = Access(keys, 3, None, None, clock)
    left = [admit(access).headers()["x-ratelimit-remaining-requests"] for _ in range(3)]
    assert left == ["2", "1", "0"]
    error = refused(access)
    assert (error.status, error.code, error.type) == (429, "rate_limit_exceeded", "rate_limit_error")
    assert error.retry_after == 20 and "limit 3" in str(error) and "20s" in str(error)
    assert error.headers == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
        "retry-after": "20",
    }
    assert admit(access, "sk-b#b").name == "bob"  # whose limit is another
    assert refused(access, "sk-alice-new").status == 429  # alice again
    clock.now += 19.5
    assert refused(access).retry_after == 1
    clock.now += 0.5
    admit(access)
    assert refused(access).retry_after == 20
    clock.now += 3600
    assert [admit(access).name for _ in range(3)] == ["alice"] * 3
    refused(access)


def test_tokens_a_minute_are_estimated_then_settled(keys, clock):
    access = Access(keys, None, 600, None, clock)
    first = admit(access, tokens=500)
    assert first.headers()["x-ratelimit-remaining-tokens"] == "100"
    assert refused(access, "sk-alice", 200).retry_after == 10
    access.settle(first, 50)
    assert first.headers()["x-ratelimit-remaining-tokens"] == "550"
    access.settle(first, 50)
    assert first.headers()["x-ratelimit-remaining-tokens"] == "550"
    second = admit(access, tokens=550)
    access.settle(second, 850)  # 300 more than were there
    assert second.headers()["x-ratelimit-remaining-tokens"] == "0"
    assert second.headers()["x-ratelimit-reset-tokens"] == "1m30s"
    assert refused(access, "sk-alice", 0).retry_after == 30
    clock.now += 30
    admit(access, tokens=0)
    assert refused(access, "sk-alice", 10).retry_after == 1


def test_what_is_given_back_never_exceeds_the_limit(keys, clock):
    access = Access(keys, None, 600, None, clock)
    caller = admit(access, tokens=600)
    clock.now += 60
    access.settle(caller, 0)
    assert caller.headers()["x-ratelimit-remaining-tokens"] == "600"
    admit(access, tokens=600)
    assert refused(access, "sk-alice", 1).retry_after == 1


def test_a_request_that_will_never_fit_is_not_to_be_tried_again(keys, clock):
    access = Access(keys, 5, 600, None, clock)
    error = refused(access, "sk-alice", 601)
    assert (error.status, error.code, error.retry_after) == (429, "rate_limit_exceeded", None)
    assert error.headers["x-should-retry"] == "false" and "retry-after" not in error.headers
    assert "too large" in str(error) and "601" in str(error)


def test_a_refused_request_takes_nothing(keys, clock):
    access = Access(keys, 2, 600, None, clock)
    caller = admit(access, tokens=600)
    for _ in range(5):
        refused(access, "sk-alice", 1)
    assert caller.headers()["x-ratelimit-remaining-requests"] == "1"
    access.settle(caller, 0)
    admit(access, tokens=600)
    assert refused(access, "sk-alice", 300).retry_after == 30  # the longer of both waits


@pytest.mark.parametrize("per_minute", [1, 7, 60, 1000, 123_457])
def test_over_time_exactly_the_limit_comes_through(per_minute, clock, rng):
    bucket = Bucket("requests", per_minute, clock)
    bucket.take(per_minute)
    admitted = 0
    # A caller who does as told: waits, asks; the waits are never too short, and add up to the limit's rate.
    start = clock.now
    for _ in range(500):
        amount = int(rng.integers(1, min(per_minute, 50) + 1))
        clock.now += bucket.wait(amount)
        assert bucket.wait(amount) == 0
        bucket.take(amount)
        admitted += amount
        clock.now += float(rng.random()) * 30 / per_minute
    assert admitted <= (clock.now - start) * per_minute / 60 + 1e-3
    assert admitted >= (clock.now - start) * per_minute / 60 - per_minute


def test_a_restart_does_not_refill_the_limits(keys, clock, tmp_path):
    ledger = Ledger(str(tmp_path / "ledger"))
    now = time.time()
    for age, key, tokens in ((300, "alice", 10_000), (10, "alice", 200), (0, "alice", 300), (0, "bob", 60)):
        ledger.record(Entry(now - age, "r", key, "m", "/v1/completions", tokens, 0, 0, 200)).result()
    access = Access(keys, 10, 600, ledger, clock)
    ledger.close()
    assert int(admit(access).headers()["x-ratelimit-remaining-tokens"]) in range(195, 206)  # 600 - 200 + 100 - 300
    assert int(admit(access, "sk-b#b").headers()["x-ratelimit-remaining-tokens"]) in range(540, 551)
    assert int(admit(access).headers()["x-ratelimit-remaining-requests"]) in range(6, 9)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0001, "1ms"), (0.12, "120ms"), (1, "1s"), (7.66, "7.66s"), (59.9999, "1m0s"), (360, "6m0s")],
)
def test_durations_read_like_openais(seconds, text):
    assert duration(seconds) == text
