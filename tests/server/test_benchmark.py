"""benchmarks/serve.py's figures are of what was asked for."""

import asyncio

import pytest

from benchmarks.serve import _bare
from benchmarks.streams import Case, Timing, measure, summarize


def test_summary():
    timings = [Timing(0.0, [1.0, 2.0, 4.0], 5), Timing(2.0, [2.5, 5.0], 2)]
    found = summarize(timings)
    assert (found["seconds"], found["output_tokens"], found["output_tokens_per_second"]) == (5.0, 7, 1.4)
    assert (found["mean_time_to_first_token"], found["time_to_first_token_p99"]) == (0.75, 1.0)
    assert (found["time_per_token_p50"], found["time_per_token_p99"], found["gap_p99"]) == (2.5, 2.5, 2.5)


def test_cases():
    case = Case(40, 6, 2, rate=10.0, seed=3)
    prompts, arrivals = case.prompts(50), case.arrivals()
    assert len({tuple(prompt) for prompt in prompts}) == 40
    assert {len(prompt) for prompt in prompts} == {6} and all(3 <= token < 50 for p in prompts for token in p)
    assert arrivals == sorted(arrivals) and 2 < arrivals[-1] < 8
    assert Case(3, 1, 1).arrivals() == [0.0] * 3


@pytest.mark.parametrize("rate", [0.0, 50.0])
def test_measured_through_http_and_without(server, llm, rate):
    case = Case(3, 5, 7, rate=rate)
    found = asyncio.run(measure(server.url, case, llm.engine.valid_vocab))
    assert found["output_tokens"] == 3 * 7 and found["seconds"] > 0
    call = asyncio.run_coroutine_threadsafe(_in_engine(server, case), server.loop)
    assert call.result(120)["output_tokens"] == 3 * 7


async def _in_engine(server, case):
    return await server.runner.call(lambda engine: _bare(engine, case))


def test_a_server_that_refuses(server):
    with pytest.raises(RuntimeError, match="400.*vocabulary"):
        asyncio.run(measure(server.url, Case(1, 5, 7), 10**9))
