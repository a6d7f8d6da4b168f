"""The model as requests see it: its name, and what they become for the engine. All of it may run in any thread."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ernie_jax.engine import SamplingParams
from ernie_jax.errors import UserError
from ernie_jax.llm import LLM
from ernie_jax.server.answers import Choice
from ernie_jax.server.protocol import (
    ApiError,
    CompletionRequest,
    Conversation,
    Generation,
    context_exceeded,
    model_not_found,
)
from ernie_jax.server.runner import Job
from ernie_jax.text.answer import AnswerFormat, tag_ids
from ernie_jax.text.guidance import Guidance


class Work(NamedTuple):
    """What a request asks of the engine: jobs[i] becomes choices[i].

    Attributes:
      prompts: token ids; each has as many jobs as the others.
    """

    prompts: list[list[int]]
    jobs: list[Job]
    choices: list[Choice]


class ServedModel:
    """A loaded model under its public name.

    Attributes:
      context: the most tokens of prompt and answer together.
      defaults: the settings that the model's makers recommend.
      moe_layers: the layers with experts.

    Raises:
      UserError: if the model has no tokenizer.
    """

    def __init__(self, llm: LLM, name: str):
        if llm.tokenizer is None:
            raise UserError(f"{name} has no tokenizer, which the server needs")
        engine = llm.engine
        self.name = name
        self.created = int(time.time())
        self.tokenizer = llm.tokenizer
        self.template = llm.template
        self.context = min(llm.config.max_position_embeddings, engine.group_tokens)
        self.defaults: SamplingParams = llm.sampling_params()
        self.moe_layers = llm.config.moe_layers
        self._experts = llm.config.moe_num_experts if self.moe_layers else 0
        self._engine = engine
        self._guidance = Guidance(llm.tokenizer, llm.config.vocab_size, engine.stop_ids)
        self._tags = tag_ids(llm.tokenizer)

    @property
    def card(self) -> dict[str, Any]:
        """Describe the model for /v1/models."""
        card = {"id": self.name, "object": "model", "created": self.created, "owned_by": "ernie_jax"}
        sampling = {"temperature": self.defaults.temperature, "top_p": self.defaults.top_p}
        return card | {"max_model_len": self.context, "num_experts": self._experts, "default_sampling": sampling}

    def check_name(self, name: str | None) -> None:
        """Refuse a request for another model; one that names none is for this.

        Raises:
          ApiError: 404.
        """
        if name not in (None, self.name):
            raise model_not_found(name, self.name)

    def routing(self, experts: Sequence[np.ndarray]) -> dict[str, Any]:
        """Return the `routing` of an answer's tokens, each of which brings its experts [L, k]."""
        chosen = [token.tolist() for token in experts]
        return {"layers": list(self.moe_layers), "num_experts": self._experts, "experts": chosen}

    def chat(self, conversation: Conversation, generation: Generation, field: str = "messages") -> Work:
        """Return the work for a conversation.

        Raises:
          UserError: naming the field, if it can't be done.
        """
        text = conversation.render(self.template)
        form = conversation.format(self.template, text, generation.stream)
        grammar = conversation.grammar(self._guidance, form)
        return self._work([self._encode(text, field)], generation, grammar, form, field)

    def completion(self, request: CompletionRequest) -> Work:
        """Return the work for texts to be continued.

        Raises:
          UserError: naming the field, if it can't be done.
        """
        prompts = [self._encode(p, "prompt") if isinstance(p, str) else p for p in request.prompts]
        grammar = self._guidance.grammar(AnswerFormat(), request.text) if request.text else None
        return self._work(prompts, request.generation, grammar, None, "prompt")

    def encode(self, prompt: str | Conversation) -> list[int]:
        """Return the token ids of a text or conversation."""
        if isinstance(prompt, Conversation):
            return self._encode(prompt.render(self.template), "messages")
        return self._encode(prompt, "prompt")

    def _encode(self, text: str, field: str) -> list[int]:
        try:
            return self.tokenizer.encode(text)
        except UserError as error:
            raise ApiError.of(error, field) from None

    def _work(self, prompts, generation: Generation, grammar, form: AnswerFormat | None, field: str) -> Work:
        if generation.include_routing and not self.moe_layers:
            raise ApiError(
                "'include_routing' asks which experts were chosen, and this model has none; leave it out.",
                "include_routing",
                "unsupported_parameter",
            )
        jobs = []
        for prompt in prompts:
            if len(prompt) >= self.context:
                raise context_exceeded(self.context, len(prompt), generation.max_tokens or 1, field)
            for params in generation.params(len(prompt), self.context):
                jobs.append(Job(prompt, params, grammar and grammar.copy(), generation.include_routing))
            try:
                self._engine.check(prompt, jobs[-1].params)
            except UserError as error:
                raise ApiError.of(error, field) from None
        keep = self._tags if form else frozenset()
        choices = [
            Choice(index, self.tokenizer, job.params, self._engine.stop_ids, form, keep)
            for index, job in enumerate(jobs)
        ]
        return Work(prompts, jobs, choices)
