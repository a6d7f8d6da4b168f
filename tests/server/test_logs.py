"""The log: lines of JSON that say who did what, not what they said."""

import datetime
import io
import json
import logging
import threading

import pytest

from ernie_jax.server.logs import Log
from ernie_jax.server.protocol import Usage


@pytest.fixture
def stream():
    return io.StringIO()


def lines(stream):
    assert stream.getvalue().endswith("\n")
    return [json.loads(line) for line in stream.getvalue().split("\n")[:-1]]


def test_a_request(stream):
    before = datetime.datetime.now(datetime.UTC)
    Log(stream).request("req-1", "alice", "/v1/completions", 200, 0.12345678, Usage(10, 5, 8), finish_reason="stop")
    (line,) = lines(stream)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "event": "request",
        "request_id": "req-1",
        "key": "alice",
        "endpoint": "/v1/completions",
        "status": 200,
        "seconds": 0.123457,
        "tokens": {"prompt": 10, "cached": 8, "generated": 5},
        "finish_reason": "stop",
    }
    time = datetime.datetime.fromisoformat(json.loads(stream.getvalue())["time"])
    assert abs(time - before) < datetime.timedelta(seconds=5)


def test_what_is_not_known_is_left_out_and_failures_stand_out(stream):
    log = Log(stream)
    for status in (200, 404, 499, 503):
        log.request("r", None, "/v1/models", status, 0.0)
    assert [line["level"] for line in lines(stream)] == ["info", "warning", "warning", "error"]
    assert all("key" not in line and "tokens" not in line for line in lines(stream))


def test_prompts_only_where_asked_for(stream):
    said = [{"role": "user", "content": "my secret\n\u2028 \ud800"}]
    Log(stream).request("r", "a", "/v1/chat/completions", 200, 1.0, prompt=said)
    Log(stream).write("info", "event", prompt="my secret")
    assert "secret" not in stream.getvalue() and "prompt" not in stream.getvalue()
    Log(stream, log_prompts=True).request("r", "a", "/v1/chat/completions", 200, 1.0, prompt=said)
    assert lines(stream)[-1]["prompt"] == said


@pytest.mark.parametrize("log_prompts", [False, True])
def test_exceptions_show_where_they_come_from(stream, log_prompts):
    log = Log(stream, log_prompts)
    logger = logging.Logger("some.library")
    logger.addHandler(log.handler())
    try:
        int("my secret")
    except ValueError as error:
        log.exception("step", error, request_id="r")
        logger.exception("it broke")
    logger.warning("port %d is taken\nreally", 80)
    first, second, third = lines(stream)
    for line, event in ((first, "step"), (second, "it broke")):
        assert (line["level"], line["event"], line["error"]) == ("error", event, "ValueError")
        assert "test_logs.py" in line["places"][0]
        assert ("my secret" in line.get("message", "")) == log_prompts
    assert first["request_id"] == "r" and second["logger"] == "some.library"
    assert (third["level"], third["event"]) == ("warning", "port 80 is taken\nreally")


def test_lines_of_many_threads_stay_whole(stream):
    log = Log(stream)

    def work(number):
        for index in range(200):
            log.write("info", "x", number=number, index=index, text="é\n" * 50)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((line["number"], line["index"]) for line in lines(stream)) == [
        (number, index) for number in range(8) for index in range(200)
    ]


def test_stderr_is_where_it_goes_and_its_end_hurts_nobody(capsys, stream):
    Log().write("info", "hello", odd=set)
    assert json.loads(capsys.readouterr().err)["event"] == "hello"
    stream.close()
    Log(stream).write("info", "nobody listens")
