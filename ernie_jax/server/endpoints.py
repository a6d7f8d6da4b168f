"""The endpoints that generate: chat, completions and responses."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from ernie_jax.errors import UserError
from ernie_jax.server.answers import Answers, score_prompt
from ernie_jax.server.hooks import NoMetrics, OpenAccess
from ernie_jax.server.http import EventStream, json_response, until_disconnected
from ernie_jax.server.model import ServedModel, Work
from ernie_jax.server.protocol import (
    DONE,
    AnswerMessage,
    ApiError,
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    Fields,
    Generation,
    ResponseAnswer,
    ResponsesRequest,
    TokenScore,
    completion_logprobs,
    named_event,
    plain_event,
)
from ernie_jax.server.runner import Runner
from ernie_jax.text.answer import Content, Event

# Log-probabilities of a prompt take all of its logits at once, and hold up everybody else.
MAX_SCORED_PROMPT = 2048


class Generator:
    """Answer the requests that generate.

    Args:
      timeout: seconds a request may take, which it can shorten but not extend; None is no limit.
    """

    def __init__(
        self,
        model: ServedModel,
        runner: Runner,
        access: OpenAccess,
        metrics: NoMetrics,
        timeout: float | None,
    ):
        self._model = model
        self._runner = runner
        self._access = access
        self._metrics = metrics
        self._timeout = timeout

    async def chat(self, request: Request, fields: Fields) -> Response:
        """Answer /v1/chat/completions."""
        asked = ChatRequest.parse(fields, self._model.defaults)
        self._model.check_name(asked.model)
        work = await asyncio.to_thread(self._model.chat, asked.conversation, asked.generation)
        answer = ChatAnswer(_id("chatcmpl-"), self._model.name, int(time.time()), asked.generation.include_usage)
        scores = self._chat_scores if asked.generation.sampling.logprobs else lambda scores: None
        routing = self._routing(asked.generation)

        async def events(answers: Answers) -> AsyncIterator[bytes]:
            begun = set()
            async for choice, parts, found, experts in answers:
                if choice.index not in begun:
                    begun.add(choice.index)
                    yield plain_event(answer.first_chunk(choice.index))
                if chunk := answer.chunk(choice.index, parts, scores(found), routing(experts)):
                    yield plain_event(chunk)
                if choice.reason:
                    yield plain_event(answer.last_chunk(choice.index, choice.reason, choice.calls))
            if asked.generation.include_usage:
                yield plain_event(answer.usage_chunk(answers.usage))
            yield DONE

        async def body(answers: Answers) -> dict[str, Any]:
            gathered = [(AnswerMessage(), [], []) for _ in answers.choices]
            async for choice, parts, found, experts in answers:
                message, all_found, all_experts = gathered[choice.index]
                message.add(parts)
                all_found += found
                all_experts += experts
            choices = [
                answer.choice(choice.index, message, choice.reason, scores(found), routing(experts))
                for choice, (message, found, experts) in zip(answers.choices, gathered, strict=True)
            ]
            return answer.completion(choices, answers.usage)

        return await self._respond(request, asked.generation, work, events, body)

    async def completions(self, request: Request, fields: Fields) -> Response:
        """Answer /v1/completions."""
        asked = CompletionRequest.parse(fields, self._model.defaults)
        generation = asked.generation
        self._model.check_name(asked.model)
        work = await asyncio.to_thread(self._model.completion, asked)
        answer = CompletionAnswer(_id("cmpl-"), self._model.name, int(time.time()), generation.include_usage)
        params, n = generation.sampling, generation.n
        routing = self._routing(generation)
        echoes = [("", [])] * len(work.choices)
        if asked.echo:
            found = [
                await self._echo(prompt, text, params) for prompt, text in zip(work.prompts, asked.prompts, strict=True)
            ]
            echoes = [echo for echo in found for _ in range(n)]
        if generation.max_tokens == 0:
            work = work._replace(jobs=[])

        def logprobs(scores: list[TokenScore], offset: int = 0) -> Mapping[str, Any] | None:
            return completion_logprobs(self._model.tokenizer, scores, offset) if params.logprobs else None

        async def events(answers: Answers) -> AsyncIterator[bytes]:
            reason = None if work.jobs else "length"
            lengths = [0] * len(echoes)
            for index, (text, scores) in enumerate(echoes):
                lengths[index] = len(text)
                if asked.echo:
                    yield plain_event(answer.chunk(index, text, reason, logprobs=logprobs(scores)))
            async for choice, parts, scores, experts in answers:
                text, index = _text(parts), choice.index
                if text or scores or experts or choice.reason:
                    details = logprobs(scores, lengths[index]) if scores else None
                    chunk = answer.chunk(index, text, choice.reason, logprobs=details, routing=routing(experts))
                    yield plain_event(chunk)
                lengths[index] += len(text)
            if generation.include_usage:
                yield plain_event(answer.usage_chunk(answers.usage))
            yield DONE

        async def body(answers: Answers) -> dict[str, Any]:
            gathered = [([text], list(scores), []) for text, scores in echoes]
            async for choice, parts, scores, experts in answers:
                texts, all_scores, all_experts = gathered[choice.index]
                texts.append(_text(parts))
                all_scores += scores
                all_experts += experts
            choices = [
                answer.choice(
                    choice.index, "".join(texts), choice.reason or "length", logprobs(scores), routing(experts)
                )
                for choice, (texts, scores, experts) in zip(answers.choices, gathered, strict=True)
            ]
            return answer.completion(choices, answers.usage)

        return await self._respond(request, generation, work, events, body)

    async def responses(self, request: Request, fields: Fields) -> Response:
        """Answer /v1/responses."""
        asked = ResponsesRequest.parse(fields, self._model.defaults)
        self._model.check_name(asked.model)
        work = await asyncio.to_thread(self._model.chat, asked.conversation, asked.generation, "input")
        answer = ResponseAnswer(asked, _id("resp_"), self._model.name, int(time.time()))

        routing = self._routing(asked.generation)

        async def steps(answers: Answers) -> AsyncIterator[list[dict[str, Any]]]:
            yield answer.start()
            all_experts = []
            async for _, parts, scores, experts in answers:
                all_experts += experts
                yield answer.add(parts, self._chat_scores(scores))
            yield answer.finish(answers.choices[0].reason, answers.usage, routing(all_experts))

        async def events(answers: Answers) -> AsyncIterator[bytes]:
            async for event in _flat(steps(answers)):
                yield named_event(event)

        async def body(answers: Answers) -> dict[str, Any]:
            async for _ in steps(answers):
                pass
            return answer.body

        def failure(error: ApiError) -> Iterator[bytes]:
            return map(named_event, answer.fail(error))

        return await self._respond(request, asked.generation, work, events, body, failure)

    def _routing(self, generation: Generation) -> Callable[[list[np.ndarray]], dict[str, Any] | None]:
        """Return what makes `routing` of tokens' experts: nothing, unless it is asked for."""
        return self._model.routing if generation.include_routing else lambda experts: None

    async def _respond(
        self,
        request: Request,
        generation: Generation,
        work: Work,
        events: Callable[[Answers], AsyncIterator[bytes]],
        body: Callable[[Answers], Any],
        failure: Callable[[ApiError], Iterator[bytes]] = lambda error: iter([plain_event(error.body)]),
    ) -> Response:
        """Generate, and return the answer whole or as a stream; `failure` ends a stream that can't go on."""
        timeouts = [seconds for seconds in (generation.timeout, self._timeout) if seconds is not None]
        stream = self._runner.submit(work.jobs, generation.priority, min(timeouts, default=None))
        account, caller = request.state.account, request.state.caller

        async def settle() -> None:
            account.close(answers.usage)
            await account.kept()

        answers = Answers(stream, work.choices, [len(prompt) for prompt in work.prompts], self._metrics, settle)
        account.open(caller, request.state.endpoint, answers.usage)

        def close() -> None:
            answers.close()
            usage = account.usage = answers.usage
            self._metrics.count_tokens(usage.prompt, usage.cached, usage.completion)
            self._access.settle(caller, usage.prompt + usage.completion)

        async def guarded() -> AsyncIterator[bytes]:
            # The status is sent: what fails now can only be told in the stream.
            try:
                await account.kept()
                async for event in events(answers):
                    yield event
            except UserError as error:
                account.close(answers.usage)
                with contextlib.suppress(ApiError):  # it may be what failed
                    await account.kept()
                for event in failure(ApiError.of(error)):
                    yield event

        if generation.stream:
            return EventStream(guarded(), close, caller.headers())
        try:
            answer = await until_disconnected(request.receive, body(answers))
        except UserError as error:
            account.close(answers.usage, ApiError.of(error).status)
            await account.kept()
            raise
        finally:
            close()
        return json_response(answer, headers=caller.headers())

    async def _echo(self, prompt: list[int], text: str | list[int], params) -> tuple[str, list[TokenScore]]:
        """Return a prompt's text, and its scores if they are wanted."""
        text = text if isinstance(text, str) else self._model.tokenizer.decode(text)
        if not params.logprobs:
            return text, []
        if len(prompt) > MAX_SCORED_PROMPT:
            raise ApiError(
                f"Log-probabilities of a prompt are limited to {MAX_SCORED_PROMPT} tokens, and this one has "
                f"{len(prompt)}; leave 'echo' or 'logprobs' out.",
                "echo",
                "invalid_value",
            )
        logits = await self._runner.call(lambda engine: engine.logits(prompt))
        return text, await asyncio.to_thread(score_prompt, logits, prompt, params.top_logprobs)

    def _chat_scores(self, scores: list[TokenScore]) -> list[dict[str, Any]]:
        return [score.chat(self._model.tokenizer) for score in scores]


def _id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex


def _text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


async def _flat(lists: AsyncIterator[list]) -> AsyncIterator[Any]:
    async with contextlib.aclosing(lists):
        async for items in lists:
            for item in items:
                yield item
