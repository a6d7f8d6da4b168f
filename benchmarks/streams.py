"""Stream answers from a server and time their tokens.

    python -m benchmarks.streams '{"url": "http://127.0.0.1:8000", "streams": 16, "prompt": 1024, "output": 1024, ...}'

A process of its own, without JAX, so that it takes nothing from the server's; and plain sockets, because libraries take
longer to read a token than a server to send it. `benchmarks.serve` runs it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import ssl
import statistics
import sys
import time
import urllib.parse
from collections.abc import Sequence
from typing import Any

_FIRST_ID = 3  # after padding, start and end
_LINE = 1 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class Case:
    """What is asked for.

    Attributes:
      streams: requests; all at once, or in a Poisson process of `rate` a second.
      prompt, output: tokens of each.
    """

    streams: int
    prompt: int
    output: int
    rate: float = 0.0
    seed: int = 0

    def prompts(self, vocabulary: int) -> list[list[int]]:
        """Draw prompts, all different."""
        rng = random.Random(self.seed)
        return [[rng.randrange(_FIRST_ID, vocabulary) for _ in range(self.prompt)] for _ in range(self.streams)]

    def arrivals(self) -> list[float]:
        """Draw when each request comes, in seconds."""
        rng, now, found = random.Random(self.seed), 0.0, []
        for _ in range(self.streams):
            found.append(now)
            now += rng.expovariate(self.rate) if self.rate else 0.0
        return found


@dataclasses.dataclass(frozen=True)
class Timing:
    """When a request was due, when its tokens came, and how many they were: several may come at once."""

    due: float
    times: list[float]
    tokens: int


def summarize(timings: Sequence[Timing]) -> dict[str, float]:
    """Sum up: seconds from the first arrival to the last token, output tokens a second, and percentiles of seconds."""
    seconds = max(timing.times[-1] for timing in timings) - min(timing.due for timing in timings)
    tokens = sum(timing.tokens for timing in timings)
    first = [timing.times[0] - timing.due for timing in timings]
    each = [(t.times[-1] - t.times[0]) / (t.tokens - 1) for t in timings if t.tokens > 1]
    gaps = [after - before for t in timings for before, after in zip(t.times, t.times[1:], strict=False)]
    found = {"seconds": seconds, "output_tokens": tokens, "output_tokens_per_second": tokens / seconds}
    found["mean_time_to_first_token"] = statistics.fmean(first)
    for name, values in (("time_to_first_token", first), ("time_per_token", each), ("gap", gaps)):
        ordered = sorted(values) or [0.0]
        for percent in (50, 99):
            found[f"{name}_p{percent}"] = ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
    return found


async def measure(url: str, case: Case, vocabulary: int) -> dict[str, float]:
    """Ask a server and sum up what it took.

    Raises:
      OSError: if it can't be reached.
      RuntimeError: if it does not answer as it should.
    """
    place = urllib.parse.urlsplit(url)
    start = asyncio.Event()
    begun = [0.0]

    async def one(prompt: list[int], arrival: float) -> Timing:
        body = {"prompt": prompt, "max_tokens": case.output, "temperature": 0, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        content = json.dumps(body).encode()
        head = f"POST {place.path.rstrip('/').removesuffix('/v1')}/v1/completions HTTP/1.1\r\nhost: {place.netloc}\r\n"
        head += f"connection: close\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n"
        if key := os.environ.get("OPENAI_API_KEY"):
            head += f"authorization: Bearer {key}\r\n"
        await start.wait()
        due = begun[0] + arrival
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        secure = ssl.create_default_context() if place.scheme == "https" else None
        port = place.port or (443 if secure else 80)
        reader, writer = await asyncio.open_connection(place.hostname, port, ssl=secure, limit=_LINE)
        try:
            writer.write(head.encode() + b"\r\n" + content)
            return await _read(reader, due)
        finally:
            writer.close()

    requests = zip(case.prompts(vocabulary), case.arrivals(), strict=True)
    tasks = [asyncio.create_task(one(*request)) for request in requests]
    await asyncio.sleep(0)  # all bodies are made
    begun[0] = time.perf_counter()
    start.set()
    return summarize(await asyncio.gather(*tasks))


async def _read(reader: asyncio.StreamReader, due: float) -> Timing:
    times: list[float] = []
    last = b""
    status = (await reader.readline()).split()
    if status[1:2] != [b"200"]:
        rest = (await reader.read()).partition(b"\r\n\r\n")[2]
        raise RuntimeError(f"the server answers {b' '.join(status).decode()}: {rest.decode()[:300]}")
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            times.append(time.perf_counter())
            last = line
        elif line.startswith(b"data: [DONE]"):
            break
    told: dict[str, Any] = json.loads(last[6:] or b"{}")
    if not told.get("usage"):
        raise RuntimeError(f"a stream ended before its time: {told.get('error', told)}")
    return Timing(due, times[:-1], told["usage"]["completion_tokens"])


def main() -> None:
    asked = json.loads(sys.argv[1])
    url, vocabulary = asked.pop("url"), asked.pop("vocabulary")
    try:
        print(json.dumps(asyncio.run(measure(url, Case(**asked), vocabulary))))
    except (OSError, RuntimeError) as error:
        sys.exit(f"{url}: {error}")


if __name__ == "__main__":
    main()
