"""What the generating endpoints share: sampling, length, streaming, guided output, usage and log-probabilities."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ernie_jax.engine.sampling import MAX_TOP_LOGPROBS, SamplingParams
from ernie_jax.errors import UserError
from ernie_jax.server.protocol.errors import ApiError, context_exceeded
from ernie_jax.server.protocol.fields import Fields, check_kind
from ernie_jax.text.guidance import TextConstraint
from ernie_jax.text.tokenizer import Tokenizer

MAX_CHOICES = 128

# Request fields that are fields of SamplingParams; stop and logit_bias come in forms that it understands.
_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "stop", "stop_token_ids", "ignore_eos",
)  # fmt: skip
# What OpenAI's clients may send and what makes no difference to the answer.
_IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options",
)  # fmt: skip
# What other servers' clients may send, as long as it asks for what happens anyway.
_NEUTRAL = {
    "min_tokens": (0,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "add_special_tokens": (False,),
}
_STREAM_NEUTRAL = {"include_obfuscation": (True, False), "continuous_usage_stats": (False,)}


@dataclasses.dataclass(frozen=True)
class Generation:
    """How answers are made, whatever the endpoint.

    Attributes:
      sampling: everything but the length and the choices' own seeds.
      max_tokens: the most tokens of an answer; None is what the context leaves. 0: no answer, only the prompt's scores.
      length_field: the request's field that says so.
      n: how many answers to each prompt.
      include_usage: whether a stream ends with a chunk of usage.
      include_routing: whether the chosen experts are part of the answer.
      priority: lower goes first.
      timeout: seconds after which the request is given up; None is never.
    """

    sampling: SamplingParams
    max_tokens: int | None = None
    length_field: str = "max_tokens"
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    include_routing: bool = False
    priority: int = 0
    timeout: float | None = None

    def params(self, prompt_tokens: int, context: int) -> list[SamplingParams]:
        """Return the settings of each of the n answers to a prompt.

        Args:
          prompt_tokens: how long the prompt is.
          context: the most tokens of prompt and answer together.

        Raises:
          ApiError: if they don't fit.
        """
        wanted = self.max_tokens if self.max_tokens is not None else max(context - prompt_tokens, 1)
        if prompt_tokens + wanted > context:
            raise context_exceeded(context, prompt_tokens, wanted, self.length_field)
        base, seed = dataclasses.replace(self.sampling, max_new_tokens=max(wanted, 1)), self.sampling.seed
        seeds = [None if seed is None else (seed + index) % 2**64 for index in range(self.n)]
        return [dataclasses.replace(base, seed=seed) for seed in seeds]


def read_generation(
    fields: Fields,
    defaults: SamplingParams,
    length_fields: Sequence[str],
    logprobs: int | None,
    default_length: int | None = None,
    shortest: int = 1,
) -> Generation:
    """Read the fields that all generating endpoints share.

    Args:
      defaults: the model's recommended settings.
      length_fields: names of the length limit; the first that is there counts.
      logprobs: how many alternatives to each token are wanted, None for no log-probabilities.
      shortest: the lowest limit.

    Raises:
      ApiError: naming the field.
    """
    sampling = defaults
    given = {name: fields.get(name) for name in _SAMPLING}
    for name, value in given.items():
        if value is not None and not (name == "stop" and value == []):
            sampling = _replace(sampling, fields.at(name), **{name: value})
    seed = fields.get("seed", "an integer")
    sampling = _replace(sampling, fields.at("seed"), seed=seed if seed is None else seed % 2**64)
    sampling = dataclasses.replace(sampling, logprobs=logprobs is not None, top_logprobs=logprobs or 0)

    lengths = {name: fields.integer(name, shortest, 2**31 - 1) for name in length_fields}
    length_field = next((name for name, value in lengths.items() if value is not None), length_fields[0])
    length = default_length if lengths[length_field] is None else lengths[length_field]
    stream = fields.get("stream", "a boolean", False)
    include_usage = False
    if options := fields.object("stream_options"):
        if not stream:
            raise fields.invalid("stream_options", "it is only allowed when 'stream' is true")
        include_usage = options.get("include_usage", "a boolean", False)
        options.neutral(_STREAM_NEUTRAL)
        options.done()
    timeout = fields.get("timeout", "a number")
    if timeout is not None and timeout <= 0:
        raise fields.invalid("timeout", f"{timeout}; it must be a positive number of seconds")
    fields.ignore(_IGNORED)
    fields.neutral(_NEUTRAL)
    return Generation(
        sampling=sampling,
        max_tokens=length,
        length_field=fields.at(length_field),
        n=fields.integer("n", 1, MAX_CHOICES, 1),
        stream=stream,
        include_usage=include_usage,
        include_routing=fields.get("include_routing", "a boolean", False),
        priority=fields.get("priority", "an integer", 0),
        timeout=timeout,
    )


def _replace(sampling: SamplingParams, path: str, **change: Any) -> SamplingParams:
    """Set a sampling field; what SamplingParams says against it becomes an error of the request's field."""
    try:
        return dataclasses.replace(sampling, **change)
    except UserError as error:
        raise ApiError(f"Invalid value: {str(error).removeprefix('sampling field ')}.", path, "invalid_value") from None


def read_top_logprobs(fields: Fields) -> int | None:
    """Read chat's logprobs and top_logprobs."""
    wanted = fields.get("logprobs", "a boolean", False)
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS, 0)
    if top and not wanted:
        raise fields.invalid("top_logprobs", "it needs 'logprobs' to be true")
    return top if wanted else None


def read_constraint(fields: Fields) -> TextConstraint | None:
    """Read what the text must be: response_format, or what vLLM's clients send.

    Raises:
      ApiError: if it is malformed, or several constraints are asked for at once.
    """
    found = []
    if form := fields.object("response_format"):
        found.append(read_format(form))
    if outputs := fields.object("structured_outputs"):
        found += [_extension(outputs, name, name) for name in _EXTENSIONS]
        outputs.done()
    found += [_extension(fields, name, f"guided_{name}") for name in _EXTENSIONS]
    constraints = [constraint for constraint in found if constraint]
    if len(constraints) > 1:
        first, second = constraints[0].field, constraints[1].field
        raise ApiError(f"'{second}' constrains the output, and so does '{first}'.", second, "invalid_value")
    return constraints[0] if constraints else None


_EXTENSIONS = ("json", "regex", "choice", "grammar")


def _extension(fields: Fields, kind: str, name: str) -> TextConstraint | None:
    """Read one of vLLM's fields, such as guided_json or structured_outputs.json; a schema may be JSON text."""
    value, path = fields.get(name), fields.at(name)
    if value is None:
        return None
    if kind == "choice":
        return TextConstraint("choice", tuple(fields.strings(name)), path)
    if kind != "json":
        return TextConstraint(kind, check_kind(value, "a string", path), path)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise fields.invalid(name, f"no JSON ({error})") from None
    return TextConstraint("json_schema", check_kind(value, "an object", path), path)


def read_format(form: Fields) -> TextConstraint | None:
    """Read response_format of chat, or text.format of responses, where the schema's fields are not nested."""
    constraint = None
    match form.choice("type", ("text", "json_object", "json_schema", "regex", "grammar", "choice"), "text"):
        case "json_object":
            constraint = TextConstraint("json_object", None, form.path)
        case "json_schema":
            nested = form.object("json_schema")
            schema = nested or form
            if nested is None and form.get("schema") is None:
                form.require("json_schema")
            schema.ignore(("name", "description"))
            strict = schema.get("strict", "a boolean", False)
            value = schema.get("schema", "an object", {})
            constraint = TextConstraint("json_schema", value, schema.at("schema"), strict)
            schema.done()
        case "choice":
            form.require("choice")
            constraint = TextConstraint("choice", tuple(form.strings("choice")), form.at("choice"))
        case "regex" | "grammar" as kind:
            constraint = TextConstraint(kind, form.require(kind, "a string"), form.at(kind))
    form.done()
    return constraint


@dataclasses.dataclass(frozen=True)
class Usage:
    """Count the tokens of a request: all its prompts and answers."""

    prompt: int
    completion: int
    cached: int = 0
    reasoning: int = 0

    @property
    def chat(self) -> dict[str, Any]:
        """Give chat's and completions' form."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }

    @property
    def responses(self) -> dict[str, Any]:
        """Give the form of /v1/responses."""
        return {
            "input_tokens": self.prompt,
            "input_tokens_details": {"cached_tokens": self.cached, "cache_write_tokens": 0},
            "output_tokens": self.completion,
            "output_tokens_details": {"reasoning_tokens": self.reasoning},
            "total_tokens": self.prompt + self.completion,
        }


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """A token, its log-probability (None for the first of a prompt) and the likeliest (id, log-probability) pairs."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()

    def chat(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return chat's form, also that of /v1/responses."""
        top = [_token(tokenizer, token) | {"logprob": logprob} for token, logprob in self.top]
        return _token(tokenizer, self.token) | {"logprob": self.logprob, "top_logprobs": top}


def _token(tokenizer: Tokenizer, token: int) -> dict[str, Any]:
    piece = tokenizer.piece_bytes(token)
    return {"token": piece.decode(errors="replace"), "bytes": list(piece)}


def completion_logprobs(tokenizer: Tokenizer, scores: Sequence[TokenScore], offset: int = 0) -> Mapping[str, list[Any]]:
    """Return the legacy form of log-probabilities; `offset` is where in the text the first token begins."""
    texts = [_token(tokenizer, score.token)["token"] for score in scores]
    offsets = [offset]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    tops = [{_token(tokenizer, t)["token"]: logprob for t, logprob in score.top} or None for score in scores]
    return {
        "tokens": texts,
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": tops,
        "text_offset": offsets[:-1],
    }
