"""Several processes serve one model: what one process would say, over the HTTP port of process 0."""

import asyncio
import contextlib
import json
import signal
import socket
import time

import httpx2
import pytest

from tests.hosts.conftest import PATIENCE, ROOT, Processes, flags, free_port

MESH = "--mesh=data:2,expert:4"
SIZES = ["--dtype=float32", "--max_sequences=16", "--cache_tokens=16384", "--prefill_chunk=64", "--nowarm_up"]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
PROMPTS = ("In the beginning God created", "And it came to pass", "Thus saith the LORD", "李白\n", "a")
LONG = "And the king said unto the people of the land, " * 30  # a page of the cache at least


@pytest.fixture(scope="module", autouse=True)
def compiling(quick_compiling):
    pass


class Server:
    """A server of one process or several, on 8 devices in all."""

    def __init__(self, processes: Processes, count: int, *extra: str):
        command = [ROOT / "main.py", "serve", f"--model={ROOT / 'models' / 'ernie-embedded'}", *SIZES, MESH, *extra]
        port, self.port = free_port(), free_port()
        self.processes, self.url = processes, f"http://127.0.0.1:{self.port}"
        devices = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // count}"}
        for index in range(count):
            which = flags(index, count, port) if count > 1 else []
            processes.start(index, [*command, f"--port={self.port}", *which], **devices)
        processes.wait_for(0, "curl ")
        self.http = httpx2.Client(base_url=self.url, timeout=PATIENCE)
        assert count == 1 or processes.printed(1) == ""

    def complete(self, **body) -> dict:
        response = self.http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    @contextlib.contextmanager
    def stream(self, **body):
        """Begin a stream; yields an iterator over its events, of which the first has come."""
        body |= {"stream": True, "ignore_eos": True}
        with httpx2.stream("POST", f"{self.url}/v1/completions", json=body, timeout=PATIENCE) as response:
            lines = (line[6:] for line in response.iter_lines() if line.startswith("data: "))
            next(lines)
            yield lines


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """Start servers that several tests share."""
    with contextlib.ExitStack() as stack:

        def start(count: int) -> Server:
            processes = Processes(tmp_path_factory.mktemp(f"processes{count}"))
            stack.callback(processes.end)
            return Server(processes, count)

        yield start


@pytest.fixture(scope="module")
def pair(running) -> Server:
    return running(2)


def request(index: int) -> dict:
    """Return one of many requests, no two alike."""
    body = {"prompt": PROMPTS[index % 5] * (1 + index % 7), "max_tokens": 2 + index % 13, "ignore_eos": True}
    match index % 4:
        case 0:
            return body | {"temperature": 0, "logprobs": 3}
        case 1:
            return body | {"temperature": 1.2, "top_p": 0.95, "seed": index}
        case 2:  # with all that a sampler can do, and the longest, so that few other samplers are compiled
            penalties = {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2}
            settings = {"temperature": 0.7, "top_p": 0.9, "seed": index, "logit_bias": {"300": 2.0}, "logprobs": 3}
            return body | settings | penalties | {"max_tokens": 16}
        case _:
            grammar = {"guided_json": SCHEMA} if index % 8 == 3 else {"guided_regex": "(yes|no), [a-z ]+"}
            return body | {"temperature": 1.0, "seed": index, "ignore_eos": False} | grammar


async def stream_all(url: str, bodies: list[dict]) -> list[tuple]:
    """Stream all at the same time; returns the text, the log-probabilities and the reason of each one's end."""

    async def one(http, body):
        text, tokens, reason = "", [], None
        async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    (choice,) = json.loads(line[6:])["choices"]
                    text, reason = text + choice["text"], choice["finish_reason"] or reason
                    if choice["logprobs"]:
                        tokens += zip(choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"], strict=True)
        return text, tokens, reason

    limits = httpx2.Limits(max_connections=len(bodies))
    async with httpx2.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as http:
        return await asyncio.gather(*(one(http, body) for body in bodies))


def test_many_streams_say_what_one_process_says(pair, running):
    bodies = [request(index) for index in range(16)]
    found = []
    for server in (pair, running(1)):
        server.complete(**request(2))
        found.append(asyncio.run(stream_all(server.url, bodies)))
    ours, expected = found
    for index, ((text, tokens, reason), (their_text, their_tokens, their_reason)) in enumerate(
        zip(ours, expected, strict=True)
    ):
        assert (text, reason) == (their_text, their_reason), index
        assert [token for token, _ in tokens] == [token for token, _ in their_tokens]
        assert [value for _, value in tokens] == pytest.approx([value for _, value in their_tokens], abs=1e-4)
        if index % 2 == 0:
            assert len(tokens) == bodies[index]["max_tokens"]
        if index % 8 == 7:
            assert text[:3] in ("yes", "no,", "ye", "no"), text
    printed = pair.processes.printed(0)
    assert "2 processes on " in printed and "8 x cpu · sharding expert (data:4,expert:2)" in printed
    assert pair.processes.printed(1) == ""


def test_experts(pair):
    """Process 0 knows those of all tokens, whichever process has their sequence."""
    before = pair.metric("ernie_expert_tokens_total")
    prompts = [f"{index} cubits was the height thereof" for index in range(6)]
    body = {"prompt": prompts, "max_tokens": 4, "temperature": 0, "ignore_eos": True, "include_routing": True}
    answer = pair.complete(**body)
    for choice in answer["choices"]:
        assert [len(token) for token in choice["routing"]["experts"]] == [5] * 4
    usage = answer["usage"]
    computed = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] + 6 * 3
    assert pair.metric("ernie_expert_tokens_total") - before == 5 * 2 * computed


def test_log_probabilities_of_a_prompt(pair):
    """They are computed between two steps, by all processes."""
    logprobs = pair.complete(prompt=PROMPTS[0], max_tokens=1, echo=True, logprobs=1, temperature=0)["choices"][0]
    values = logprobs["logprobs"]["token_logprobs"]
    assert values[0] is None and len(values) > 5 and all(value < 0 for value in values[1:])


def test_prefix_cache(pair):
    first, second = (pair.complete(prompt=LONG, max_tokens=3, temperature=0) for _ in range(2))
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 128
    assert first["choices"][0]["text"] == second["choices"][0]["text"]


def test_who_leaves_frees_the_pages(pair):
    with pair.stream(prompt="a", max_tokens=1500):
        assert pair.metric('ernie_kv_pages{state="used"}') > 0
    deadline = time.monotonic() + 60
    while pair.metric('ernie_kv_pages{state="used"}'):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert pair.complete(prompt="a", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_sigterm_to_process_0_lets_answers_end(pair):
    with pair.stream(prompt="a", max_tokens=8) as events:
        pair.processes.signal(0, signal.SIGTERM)
        *_, last, done = events
        assert json.loads(last)["choices"][0]["finish_reason"] == "length" and done == "[DONE]"
    for result in pair.processes.wait():
        assert result.code == 0, result.err
        assert "Traceback" not in result.err and "error" not in result.err


def test_a_signal_to_another_process_lets_answers_end_too(processes):
    server = Server(processes, 2)
    with server.stream(prompt="a", max_tokens=8) as events:
        processes.signal(1, signal.SIGINT)
        processes.wait_for(0, "ending: ")
        processes.signal(1, signal.SIGINT)  # nothing more
        processes.signal(1, signal.SIGTERM)
        *_, last, done = events
        assert json.loads(last)["choices"][0]["finish_reason"] == "length" and done == "[DONE]"
    first, other = processes.wait()
    assert (first.code, other.code, other.err) == (0, 0, ""), first.err


def test_a_second_signal_ends_all_at_once(processes):
    server = Server(processes, 2)
    with pytest.raises(httpx2.TransportError), server.stream(prompt="a", max_tokens=1500) as events:
        processes.signal(0, signal.SIGTERM)
        processes.wait_for(0, "ending: ")
        processes.signal(0, signal.SIGTERM)
        list(events)
    first, other = processes.wait()
    assert (first.code, other.code) == (130, 130)
    assert "process 1: error: process 0 stopped: interrupted" in other.err


def test_a_killed_process_ends_the_server(processes):
    server = Server(processes, 2)
    with server.stream(prompt="a", max_tokens=1500) as events:
        processes.kill(1)
        *_, last = events
    assert json.loads(last)["error"]["message"].startswith("The server ")
    survivor = processes.wait()[0]
    assert survivor.code == 1
    sentences = [line for line in survivor.err.splitlines() if "error: " in line]
    assert len(sentences) == 1 and sentences[0].startswith("error: process 1 of 2 (on "), survivor.err
    assert "ended without a word" in sentences[0] and "Traceback" not in survivor.err


def test_the_end_of_process_0_ends_the_others(processes):
    Server(processes, 2)
    processes.kill(0)
    other = processes.wait()[1]
    assert other.code == 1 and "Traceback" not in other.err
    assert other.err.count("\n") == 2 and "process 1: error: process 0 of 2 (on " in other.err


def test_a_taken_port_ends_all(processes, port):
    command = [ROOT / "main.py", "serve", f"--model={ROOT / 'models' / 'ernie-embedded'}", *SIZES]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for index in range(2):
            processes.start(index, [*command, f"--port={taken.getsockname()[1]}", *flags(index, 2, port)])
        first, other = processes.wait()
    assert (first.code, other.code) == (1, 1)
    assert "Address already in use" in first.err and "Address already in use" in other.err
