"""Many streams at once, clients that leave, steps that fail, and the end."""

import asyncio
import contextlib
import functools
import gc
import json
import signal
import time

import httpx2
import openai
import pytest

from ernie_jax.errors import UserError
from ernie_jax.server.protocol import ApiError
from ernie_jax.text import guidance
from tests.server.conftest import running, serving
from tests.server.storm import PATIENCE

NAME = "ernie-embedded"
PROMPTS = ("In the beginning God created", "And it came to pass", "Thus saith the LORD", "李白\n", "a")
post = functools.partial(httpx2.post, timeout=PATIENCE)


def wait_for(condition):
    """Wait until something holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


async def read(client, index, length):
    """Stream one answer."""
    stream = await client.completions.create(
        model=NAME, prompt=PROMPTS[index % 5] * (1 + index % 3), max_tokens=length, seed=index, stream=True
    )
    return "".join([chunk.choices[0].text async for chunk in stream])


def test_garbage_is_not_looked_for_in_what_is_compiled(llm):
    with running(llm):
        assert gc.get_freeze_count() > 100_000
    assert gc.get_freeze_count() == 0


def test_32_streams_say_what_each_says_alone(server):
    async def at_once():
        async with server.async_client as client:
            together = await asyncio.gather(*(read(client, index, 4 + index) for index in range(32)))
            alone = [await read(client, index, 4 + index) for index in range(0, 32, 3)]
        return together, alone

    together, alone = asyncio.run(at_once())
    assert together[::3] == alone and all(together)
    wait_for(lambda: server.runner.stats.used_pages == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_sequence_within_two_steps(server, stream):
    seen = []
    before = server.runner._after_step
    server.runner._after_step = lambda stats: seen.append((stats.running, server.runner.open))
    try:
        body = {"prompt": PROMPTS[0], "max_tokens": 3000, "stream": stream, "ignore_eos": True}
        http = httpx2.Client(base_url=server.url, timeout=PATIENCE)
        if stream:
            with http.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with contextlib.suppress(httpx2.ReadTimeout):
                http.post("/v1/completions", json=body, timeout=0.5)
        http.close()
        wait_for(lambda: server.runner.open == 0)
        wait_for(lambda: server.runner.stats.used_pages == 0)
    finally:
        server.runner._after_step = before
    # Once the event loop knows, at most two steps still have it.
    assert seen and sum(running == 1 and open == 0 for running, open in seen) <= 2


def test_a_slow_reader_loses_nothing(server):
    body = {"prompt": PROMPTS[0], "max_tokens": 60, "seed": 1, "ignore_eos": True}
    whole = post(f"{server.url}/v1/completions", json=body).json()["choices"][0]["text"]
    text, http = "", httpx2.Client(base_url=server.url, timeout=PATIENCE)
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            time.sleep(0.005)
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    assert text == whole


def test_a_request_can_take_too_long(server):
    body = {"prompt": PROMPTS[0], "max_tokens": 3000, "timeout": 0.3, "ignore_eos": True}
    response = post(f"{server.url}/v1/completions", json=body)
    assert response.status_code == 408 and response.json()["error"]["code"] == "request_timeout"
    lines = post(f"{server.url}/v1/completions", json=body | {"stream": True}).text.split("\n\n")
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "request_timeout"
    with pytest.raises(openai.APIError):
        list(server.client.completions.create(model=NAME, prompt="a", max_tokens=3000, stream=True, extra_body=body))
    wait_for(lambda: server.runner.stats.used_pages == 0)


def test_a_step_that_fails_fails_its_requests_only(server, llm, monkeypatch):
    good = {"model": NAME, "prompt": PROMPTS[0], "max_tokens": 6, "temperature": 0}
    expected = server.client.completions.create(**good).choices[0].text
    step, fails = llm.engine.step, iter([True])

    def failing():
        if next(fails, False):
            step()
            raise RuntimeError("out of memory")
        return step()

    monkeypatch.setattr(llm.engine, "step", failing)
    with pytest.raises(openai.InternalServerError, match="try again"):
        server.client.completions.create(**good)
    assert server.client.completions.create(**good).choices[0].text == expected
    assert llm.engine.stats().used_pages == 0 and httpx2.get(f"{server.url}/ready").status_code == 200


def test_a_grammar_that_fails_fails_its_request_only(server, monkeypatch):
    def mask(self, out):
        raise UserError("the grammar is too complex to go on: here")

    other = server.client.completions.create(model=NAME, prompt="a", max_tokens=40, seed=1, stream=True)
    next(other)
    monkeypatch.setattr(guidance._Match, "mask", mask)
    with pytest.raises(openai.BadRequestError, match="too complex"):
        server.client.completions.create(model=NAME, prompt="a", extra_body={"guided_regex": "[ab]+"})
    assert [chunk.choices[0].finish_reason for chunk in other][-1]


def test_too_many_are_turned_away(llm):
    with running(llm, max_waiting=0) as server:
        body = {"prompt": "a", "max_tokens": 4, "n": 33}
        refused = post(f"{server.url}/v1/completions", json=body)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "overloaded"
        assert refused.headers["retry-after"] == "1"
        assert post(f"{server.url}/v1/completions", json=body | {"n": 32}).status_code == 200


def test_an_engine_that_only_fails_is_given_up(llm, monkeypatch):
    def fail():
        raise RuntimeError("the device is lost")

    with running(llm) as server, monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", fail)
        codes = [post(f"{server.url}/v1/completions", json={"prompt": "a"}).status_code for _ in range(4)]
        assert codes == [500, 500, 500, 503]
        assert httpx2.get(f"{server.url}/ready").status_code == httpx2.get(f"{server.url}/health").status_code == 503
    llm.engine.reset()


def test_a_drain_lets_answers_end(llm):
    with running(llm, drain_seconds=30) as server:
        stream = server.client.completions.create(
            model=NAME, prompt="a", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        server.loop.call_soon_threadsafe(server.listener.end)
        wait_for(lambda: server.runner.refusal)
        refused = post(f"{server.url}/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert httpx2.get(f"{server.url}/ready").status_code == 503
        assert httpx2.get(f"{server.url}/health").status_code == 200
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    assert isinstance(server.runner.refusal, ApiError)


def test_a_drain_gives_up_in_the_end(llm):
    with running(llm, drain_seconds=0.2) as server:
        stream = server.client.completions.create(
            model=NAME, prompt="a", max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        server.loop.call_soon_threadsafe(server.listener.end)
        with pytest.raises(openai.APIError, match="shut down"):
            list(stream)
    llm.engine.reset()


def test_the_command_serves_until_sigterm(checkpoint):
    with serving(checkpoint) as (process, url, lines):
        assert "sequences" in lines[-3] and "float32" in lines[-3]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(
            model="small", prompt="a", max_tokens=100, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        assert process.wait(20) == 0, lines
    record = json.loads(lines[-1])
    assert record["endpoint"] == "/v1/completions" and record["tokens"]["generated"] == 100
