"""/v1/completions: its requests, answers and stream chunks; /tokenize and /detokenize."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ernie_jax.engine.sampling import MAX_TOP_LOGPROBS, SamplingParams
from ernie_jax.server.protocol.chat import Conversation, read_conversation
from ernie_jax.server.protocol.fields import Fields, check_kind
from ernie_jax.server.protocol.generation import Generation, Usage, read_constraint, read_generation
from ernie_jax.text.guidance import TextConstraint

DEFAULT_LENGTH = 16  # OpenAI's
MAX_PROMPTS = 128

_REFUSED = {
    "suffix": "this model continues text and fills no gaps",
    "prompt_logprobs": "use 'echo'",
    "truncate_prompt_tokens": "shorten the prompt",
    "prompt_embeds": "give text or token ids",
}


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """A request of /v1/completions.

    Attributes:
      prompts: texts or token ids; each is answered n times.
      echo: whether the prompt is part of the text, and of the log-probabilities.
      text: what the new text must be.
    """

    model: str | None
    prompts: list[str | list[int]]
    echo: bool
    text: TextConstraint | None
    generation: Generation

    @classmethod
    def parse(cls, fields: Fields, defaults: SamplingParams) -> CompletionRequest:
        """Read a request; `defaults` are the model's recommended settings.

        Raises:
          ApiError: naming the field.
        """
        fields.refuse(_REFUSED)
        echo = fields.get("echo", "a boolean", False)
        generation = read_generation(
            fields,
            defaults,
            ("max_tokens",),
            logprobs=fields.integer("logprobs", 0, MAX_TOP_LOGPROBS),
            default_length=DEFAULT_LENGTH,
            shortest=0 if echo else 1,
        )
        fields.neutral({"best_of": (1, generation.n)})
        request = cls(fields.get("model", "a string"), _prompts(fields), echo, read_constraint(fields), generation)
        fields.done()
        return request


def _prompts(fields: Fields) -> list[str | list[int]]:
    prompt = fields.require("prompt")
    if isinstance(prompt, str):
        return [prompt]
    check_kind(prompt, "an array", "prompt")
    if not prompt:
        raise fields.invalid("prompt", "it is empty")
    if all(isinstance(token, int) for token in prompt):
        return [_tokens(prompt, "prompt")]
    if len(prompt) > MAX_PROMPTS:
        raise fields.invalid("prompt", f"there are {len(prompt)} prompts; at most {MAX_PROMPTS} go into one request")
    paths = [f"prompt[{index}]" for index in range(len(prompt))]
    return [
        _tokens(one, path) if isinstance(one, list) else check_kind(one, "a string", path)
        for one, path in zip(prompt, paths, strict=True)
    ]


def _tokens(value: Sequence[Any], path: str) -> list[int]:
    return [check_kind(token, "an integer", f"{path}[{index}]") for index, token in enumerate(value)]


@dataclasses.dataclass(frozen=True)
class CompletionAnswer:
    """Build what goes back to one request: the completion, or the chunks of its stream.

    Choices are numbered prompt by prompt: index = prompt * n + answer.
    """

    id: str
    model: str
    created: int
    include_usage: bool = False

    def choice(
        self,
        index: int,
        text: str,
        reason: str | None,
        logprobs: Mapping[str, Any] | None = None,
        routing: Any = None,
    ) -> dict[str, Any]:
        """Return one whole answer; `logprobs` as completion_logprobs makes them."""
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return choice if routing is None else choice | {"routing": routing}

    def completion(self, choices: Sequence[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        return self._head() | {"choices": list(choices), "usage": usage.chat}

    def chunk(self, index: int, text: str, reason: str | None = None, **details: Any) -> dict[str, Any]:
        """Return a chunk of an answer, the last one with its finish reason."""
        chunk = self._head() | {"choices": [self.choice(index, text, reason, **details)]}
        return chunk | {"usage": None} if self.include_usage else chunk

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return self._head() | {"choices": [], "usage": usage.chat}

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}


@dataclasses.dataclass(frozen=True)
class TokenizeRequest:
    """A request of /tokenize: the tokens of a text, or of a conversation as the model would see it."""

    model: str | None
    prompt: str | Conversation
    with_texts: bool

    @classmethod
    def parse(cls, fields: Fields) -> TokenizeRequest:
        """Read a request.

        Raises:
          ApiError: naming the field.
        """
        fields.neutral({"add_special_tokens": (False,), "add_generation_prompt": (True,)})
        text = fields.get("prompt", "a string")
        prompt = read_conversation(fields) if text is None else text
        request = cls(fields.get("model", "a string"), prompt, fields.get("return_token_strs", "a boolean", False))
        fields.done()
        return request

    def answer(self, tokens: Sequence[int], texts: Sequence[str], max_model_len: int) -> dict[str, Any]:
        """Return the body of the response; `texts` are those of the tokens, one by one."""
        body = {"count": len(tokens), "max_model_len": max_model_len, "tokens": list(tokens)}
        return body | {"token_strs": list(texts)} if self.with_texts else body


def parse_detokenize(fields: Fields) -> list[int]:
    """Read a request of /detokenize, whose answer is {"prompt": text}.

    Raises:
      ApiError: naming the field.
    """
    fields.get("model", "a string")
    tokens = _tokens(fields.require("tokens", "an array"), "tokens")
    fields.done()
    return tokens
