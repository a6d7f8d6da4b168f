"""Clients of every kind, good and bad, for as long as one likes: what a server meets in the open.

Each asks for one of a few answers that are known beforehand, and holds the server to them.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import itertools
import json
import random
import socket
from collections.abc import Awaitable, Callable
from typing import Any

PATIENCE = 300  # seconds: some programs are compiled when they are needed, also on a busy machine
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_TEXT = "In the beginning God created the heaven and the earth. And the earth was without form, and void; "


@dataclasses.dataclass(frozen=True)
class Question:
    """A request whose answer does not depend on what else is asked."""

    path: str
    body: dict[str, Any]

    @property
    def lengthy(self) -> bool:
        return bool(self.body.get("top_logprobs"))


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came back: the texts and finish reasons by choice, the usage, and the error of a request that failed."""

    status: int
    texts: dict[int, str]
    reasons: dict[int, str]
    usage: dict[str, Any] | None
    error: dict[str, Any] | None

    @property
    def answer(self) -> tuple:
        return self.texts, self.reasons


def questions(count: int) -> list[Question]:
    """Return requests of mixed lengths and settings; always the same ones."""
    rng = random.Random(5)
    found = []
    for index in range(count):
        body = {"seed": index, "max_tokens": rng.choice((1, 5, 20, 40, 80)), "ignore_eos": index % 2 == 0}
        body["temperature"] = rng.choice((0.0, 0.7, 1.0))
        text = _TEXT[: rng.randrange(1, len(_TEXT))] * rng.choice((1, 1, 2, 5))
        extra = {
            0: {"n": 2},
            1: {"presence_penalty": 0.8},
            2: {"stop": ["and", "。"]},
            3: {"logit_bias": {"70": -100}},
            5: {"guided_regex": "[a-f ]{10,30}"},
        }
        body |= extra.get(index % 7, {})
        if index % 7 == 4:
            turns = [{"role": "system", "content": _TEXT * 2}, {"role": "user", "content": text}]
            lengthy = {"logprobs": True, "top_logprobs": 20, "max_tokens": 80, "ignore_eos": True}
            found.append(Question(_CHAT, body | lengthy | {"messages": turns}))
        else:
            found.append(Question(_COMPLETIONS, body | {"prompt": text}))
    return found


class Storm:
    """Many clients of one server.

    Attributes:
      counts: how often each thing happened.
      usage: tokens of prompt, cached and generated of the requests that were answered to their end, by id.
    """

    def __init__(self, port: int, known: list[Question], seed: int):
        self.counts: collections.Counter[str] = collections.Counter()
        self.usage: dict[str, tuple[int, int, int]] = {}
        self._port = port
        self._known = known
        self._answers: list[tuple] = []
        self._rng = random.Random(seed)
        self._ids = (f"storm-{number}" for number in itertools.count())
        # How often each client does what, before it begins anew.
        self._ways: list[tuple[Callable[[Question, int], Awaitable[None]], int]] = [
            (self._whole, 2),
            (self._stream, 5),
            (self._slowly, 1),
            (self._leave_stream, 1),
            (self._leave_whole, 1),
            (self._leave_body, 1),
            (self._malformed, 1),
            (self._too_much, 1),
            (self._late, 1),
        ]

    async def learn(self) -> None:
        """Ask everything once, one after the other."""
        for question in self._known:
            reply = await self._ask(question, stream=False)
            assert reply.status == 200, reply.error
            self._answers.append(reply.answer)

    async def blow(self, clients: int, seconds: float) -> None:
        """Let so many clients ask one thing after the other until the time is over, then end what they began."""
        end = asyncio.get_running_loop().time() + seconds
        async with asyncio.TaskGroup() as group:
            for client in range(clients):
                group.create_task(self._client(client, end))

    async def _client(self, client: int, end: float) -> None:
        ways = [way for way, times in self._ways for _ in range(times)]
        first = ways[client % len(ways)]  # so that every way is taken, however short the time
        self._rng.shuffle(ways)
        for way in itertools.chain((first,), itertools.cycle(ways)):
            number = self._rng.randrange(len(self._known))
            await way(self._known[number], number)
            self.counts[way.__name__.strip("_")] += 1
            if asyncio.get_running_loop().time() > end:
                return

    # Ways to ask -----------------------------------------------------------------------------------------------------

    async def _whole(self, question: Question, number: int) -> None:
        self._compare(await self._patiently(question, stream=False), number)

    async def _stream(self, question: Question, number: int) -> None:
        self._compare(await self._patiently(question, stream=True), number)

    async def _slowly(self, question: Question, number: int) -> None:
        number = next(index for index, known in enumerate(self._known) if known.lengthy)
        self._compare(await self._patiently(self._known[number], stream=True, pause=0.02), number)

    async def _leave_stream(self, question: Question, number: int) -> None:
        reader, writer = await self._send(question.path, question.body | {"stream": True})
        for _ in range(self._rng.randrange(30)):
            if not await reader.readline():
                break
        writer.transport.abort()

    async def _leave_whole(self, question: Question, number: int) -> None:
        _, writer = await self._send(question.path, question.body)
        await asyncio.sleep(self._rng.random() * 0.3)
        writer.transport.abort()

    async def _leave_body(self, question: Question, number: int) -> None:
        _, writer = await self._connect()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n" + b'{"prompt": "In')
        await writer.drain()
        await asyncio.sleep(self._rng.random() * 0.1)
        writer.transport.abort()

    async def _malformed(self, question: Question, number: int) -> None:
        changes = (
            {"temperature": "hot"},
            {"n": 0},
            {"frobnicate": 1},
            {"stop": [""]},
            {"max_tokens": 10**6},
            {"guided_regex": "["},
        )
        change = self._rng.choice(changes)
        raw = b'{"prompt": "In the' if self._rng.random() < 0.3 else None
        reply = await self._ask(Question(question.path, question.body | change), stream=False, raw=raw)
        assert reply.status == 400 and reply.error["message"], reply
        assert raw or any(name in reply.error["message"] for name in (*change, "context", "guided")), reply

    async def _too_much(self, question: Question, number: int) -> None:
        reply = await self._ask(Question(_COMPLETIONS, {"prompt": ["a"] * 100, "n": 128, "max_tokens": 1}), stream=True)
        assert (reply.status, reply.error["code"]) == (503, "overloaded"), reply

    async def _late(self, question: Question, number: int) -> None:
        stream = self._rng.random() < 0.5
        endless = {"prompt": _TEXT, "max_tokens": 2000, "ignore_eos": True, "timeout": 0.01 + self._rng.random() / 2}
        reply = await self._patiently(Question(_COMPLETIONS, endless), stream)
        assert reply.error["code"] == "request_timeout" and reply.status == (200 if stream else 408), reply

    # How it is done --------------------------------------------------------------------------------------------------

    def _compare(self, reply: Reply, number: int) -> None:
        assert reply.status == 200 and reply.error is None, reply
        assert reply.answer == self._answers[number], (self._known[number], reply.answer, self._answers[number])

    async def _patiently(self, question: Question, stream: bool, pause: float = 0.0) -> Reply:
        """Ask until the server is not too busy."""
        while True:
            reply = await self._ask(question, stream, pause)
            if reply.status != 503:
                return reply
            assert reply.error["code"] == "overloaded"
            self.counts["overloaded"] += 1
            await asyncio.sleep(self._rng.random())

    async def _ask(self, question: Question, stream: bool, pause: float = 0.0, raw: bytes | None = None) -> Reply:
        body = question.body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})
        request = next(self._ids)
        reader, writer = await self._send(question.path, raw or body, request, slow=pause > 0)
        try:
            status = int((await self._line(reader)).split()[1])
            while (await self._line(reader)).strip():
                pass
            if not stream or status != 200:
                whole = json.loads(await asyncio.wait_for(reader.read(), PATIENCE))
                reply = _read(status, [whole])
            else:
                events = []
                while (line := await self._line(reader)) != b"data: [DONE]\n":
                    if line.startswith(b"data: "):
                        events.append(json.loads(line[6:]))
                        await asyncio.sleep(pause)
                    if "error" in (events or [{}])[-1]:
                        break
                reply = _read(status, events)
        finally:
            writer.close()
        if reply.usage:
            cached = reply.usage["prompt_tokens_details"]["cached_tokens"]
            self.usage[request] = reply.usage["prompt_tokens"], cached, reply.usage["completion_tokens"]
        return reply

    async def _line(self, reader: asyncio.StreamReader) -> bytes:
        line = await asyncio.wait_for(reader.readline(), PATIENCE)
        assert line, "the server hung up"
        return line

    async def _send(self, path: str, body: dict[str, Any] | bytes, request: str = "", slow: bool = False):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(content)}\r\n"
        head += f"x-request-id: {request}\r\n" if request else ""
        reader, writer = await self._connect(slow)
        writer.write(head.encode() + b"\r\n" + content)
        await writer.drain()
        return reader, writer

    async def _connect(self, slow: bool = False) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect; who reads slowly has small buffers, so that the server feels it."""
        client = socket.socket()
        client.setblocking(False)
        if slow:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", self._port))
        return await asyncio.open_connection(sock=client, limit=1 << 14 if slow else 1 << 20)


def _read(status: int, parts: list[dict[str, Any]]) -> Reply:
    texts: dict[int, str] = collections.defaultdict(str)
    reasons, usage, error = {}, None, None
    for part in parts:
        error = part.get("error", error)
        usage = part.get("usage") or usage
        for choice in part.get("choices", ()):
            said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            texts[choice["index"]] += said.get("content") or ""
            if choice["finish_reason"]:
                reasons[choice["index"]] = choice["finish_reason"]
    return Reply(status, dict(texts), reasons, usage, error)
