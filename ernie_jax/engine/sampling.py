"""How the next token is chosen: SamplingParams for the user, the sampler that runs on the device.

The sampler is a pure function of logits [B, V] and a SamplerState with one row per batch slot. Stages, in order, all in
float32:

    logit bias -> repetition, frequency and presence penalties -> ids beyond the tokenizer or a grammar removed
    -> temperature -> top-k -> top-p -> min-p -> Gumbel-max

A row with temperature 0 takes the argmax after the first three. Which stages a program holds is static (`Features`), so
that a greedy batch pays for an argmax only.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ernie_jax.errors import UserError

MAX_TOP_LOGPROBS = 20

_INT32_MAX = 2**31 - 1
_INTEGER_RANGES = {
    "max_new_tokens": (1, _INT32_MAX),
    "top_k": (0, _INT32_MAX),
    "top_logprobs": (0, MAX_TOP_LOGPROBS),
}
_SEED_RANGE = (0, 2**64 - 1)
_FLOAT_RANGES = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
}
_BIAS_RANGE = (-100.0, 100.0)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Say how one sequence is continued.

    Attributes:
      max_new_tokens: the most tokens to generate.
      temperature: divides the logits; 0 is greedy.
      top_p: keep the smallest set of likeliest tokens whose mass reaches this (after top_k); 1 is off.
      top_k: keep this many likeliest tokens; 0 is off. Tokens that tie with the last one kept are kept too, here and
        in top_p.
      min_p: drop tokens less likely than this fraction of the likeliest; 0 is off.
      repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output; 1 is off.
      frequency_penalty: subtracted once per earlier occurrence in the output.
      presence_penalty: subtracted once if the token occurs in the output.
      seed: equal seeds give equal draws for equal logits, whatever else is in the batch; None draws a seed.
      logit_bias: token id -> number added to its logit.
      stop: strings that end the text (one string, or any sequence of them).
      stop_token_ids: ids that end the text besides the model's own.
      ignore_eos: go on after the model's end-of-sequence id.
      logprobs: return the log-probability of each new token. All log-probabilities are those of the model's own
        distribution: the log-softmax of the raw logits over the whole vocabulary, before bias, penalties, temperature
        and filters.
      top_logprobs: return also the ids and log-probabilities of this many likeliest tokens (needs `logprobs`).

    Raises:
      UserError: if a field has a wrong type or lies outside its range; the sentence names both.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0

    def __post_init__(self):
        normal: dict[str, Any] = {}
        for name, bounds in _INTEGER_RANGES.items():
            normal[name] = _integer(name, getattr(self, name), bounds)
        for name, bounds in _FLOAT_RANGES.items():
            normal[name] = _float(name, getattr(self, name), bounds)
        for name in ("ignore_eos", "logprobs"):
            if not isinstance(getattr(self, name), bool):
                raise _error(name, getattr(self, name), "true or false")
        if self.seed is not None:
            normal["seed"] = _integer("seed", self.seed, _SEED_RANGE)
        normal["logit_bias"] = _bias(self.logit_bias)
        normal["stop"] = _stop_strings(self.stop)
        if isinstance(self.stop_token_ids, str) or not isinstance(self.stop_token_ids, Sequence):
            raise _error("stop_token_ids", self.stop_token_ids, "a list of token ids")
        normal["stop_token_ids"] = tuple(
            _integer("stop_token_ids", token, (0, _INT32_MAX)) for token in self.stop_token_ids
        )
        for name, value in normal.items():
            object.__setattr__(self, name, value)
        if self.top_logprobs and not self.logprobs:
            raise UserError(f"sampling field top_logprobs is {self.top_logprobs}, which needs logprobs to be true")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], defaults: SamplingParams | None = None) -> SamplingParams:
        """Build from parsed JSON; a field that is absent or null takes its value from `defaults`.

        Raises:
          UserError: on an unknown field, naming it, or a bad value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(fields) - set(known)):
            raise UserError(
                f"unknown sampling field{'s' * (len(unknown) > 1)} {', '.join(unknown)}; known are {', '.join(known)}"
            )
        given = {name: value for name, value in fields.items() if value is not None}
        return dataclasses.replace(defaults or cls(), **given)

    def check_vocabulary(self, size: int) -> None:
        """Check the token ids named here against a tokenizer of `size` ids.

        Raises:
          UserError: if logit_bias or stop_token_ids names another id.
        """
        for name in ("logit_bias", "stop_token_ids"):
            for token in getattr(self, name):
                if token >= size:
                    raise UserError(f"sampling field {name} names token id {token}; ids go from 0 to {size - 1}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0


def _error(name: str, value: Any, expected: str) -> UserError:
    return UserError(f"sampling field {name} is {value!r}: it must be {expected}")


def _integer(name: str, value: Any, bounds: tuple[int, int]) -> int:
    low, high = bounds
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= value <= high:
        raise _error(name, value, f"an integer from {low} to {high}")
    return int(value)


def _float(name: str, value: Any, bounds: tuple[float, float]) -> float:
    low, high = bounds
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low <= value <= high:
        raise _error(name, value, f"a number from {low:g} to {high:g}")
    return float(value)


def _bias(value: Any) -> dict[int, float]:
    """Normalise logit_bias; JSON objects can have only strings as keys, so decimal strings are ids too."""
    if not isinstance(value, Mapping):
        raise _error("logit_bias", value, "a mapping of token id to number")
    normal = {}
    for token, bias in value.items():
        if isinstance(token, str) and token.isdecimal():
            token = int(token)
        token = _integer("logit_bias", token, (0, _INT32_MAX))
        normal[token] = _float(f"logit_bias[{token}]", bias, _BIAS_RANGE)
    return normal


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) and s for s in strings):
        raise _error("stop", value, "a string that is not empty, or a list of such strings")
    return tuple(strings)


@dataclasses.dataclass(frozen=True)
class Features:
    """Name the stages that a compiled sampler holds; static and hashable.

    A row that does not ask for a stage passes through it unchanged, so a superset of what the batch needs is always
    correct. `bias_width` is the padded number of biased ids a row can hold, 0 for none.
    """

    random: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    bias_width: int = 0
    penalties: bool = False
    logprobs: bool = False
    top_logprobs: int = 0

    @classmethod
    def of(cls, params: Iterable[SamplingParams]) -> Features:
        """Return what these sequences need; widths are rounded up so that few programs are compiled."""
        params = list(params)
        drawn = [p for p in params if not p.is_greedy]
        return cls(
            random=bool(drawn),
            top_k=any(p.top_k > 0 for p in drawn),
            top_p=any(p.top_p < 1 for p in drawn),
            min_p=any(p.min_p > 0 for p in drawn),
            bias_width=_power_of_two(max((len(p.logit_bias) for p in params), default=0)),
            penalties=any(p.has_penalties for p in params),
            logprobs=any(p.logprobs for p in params),
            top_logprobs=min(_power_of_two(max((p.top_logprobs for p in params), default=0)), MAX_TOP_LOGPROBS),
        )

    def union(self, other: Features) -> Features:
        """Return what covers both."""
        return Features(*map(max, dataclasses.astuple(self), dataclasses.astuple(other)))

    def covers(self, needed: Features) -> bool:
        """Tell whether a state and a program built with these features also serve `needed`."""
        return all(getattr(self, f.name) >= getattr(needed, f.name) for f in dataclasses.fields(self))


def _power_of_two(count: int) -> int:
    """Round up to a power of two; 0 stays 0."""
    return 1 << (count - 1).bit_length() if count else 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerState:
    """Hold one row of sampling settings per batch slot; numpy arrays from `build_rows`, device arrays in the engine.

    A stage that is off in a row has a neutral value there: an unreachable top_k (2^31 - 1) or top_p (infinity),
    min_p 0, penalties 1 and 0, bias ids V (dropped). The last four fields are None where the features do not ask for
    them.
    """

    temperature: jax.Array  # [B] float32, 0 is greedy
    top_k: jax.Array  # [B] int32
    top_p: jax.Array  # [B] float32
    min_p: jax.Array  # [B] float32
    seed: jax.Array  # [B, 2] uint32, high word first: the data of a threefry key
    repetition_penalty: jax.Array  # [B] float32
    frequency_penalty: jax.Array  # [B] float32
    presence_penalty: jax.Array  # [B] float32
    bias_ids: jax.Array | None  # [B, bias_width] int32
    bias_values: jax.Array | None  # [B, bias_width] float32
    in_prompt: jax.Array | None  # [B, V] bool
    output_counts: jax.Array | None  # [B, V] int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampleOutput:
    """Hold the chosen tokens; log-probabilities are None where the features do not ask for them.

    A row that wants fewer than `features.top_logprobs` alternatives takes the first ones.
    """

    tokens: jax.Array  # [B] int32
    logprob: jax.Array | None  # [B] float32
    top_ids: jax.Array | None  # [B, top_logprobs] int32, likeliest first
    top_logprobs: jax.Array | None  # [B, top_logprobs] float32


def build_rows(
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]] | None = None,
    *,
    features: Features,
    vocab_size: int,
) -> SamplerState:
    """Build one state row per sequence on the host, as numpy arrays for a single transfer.

    Args:
      params: the settings, one per row; `features` must cover them.
      seeds: for each row its seed, or one drawn by the caller where `params.seed` is None.
      prompts: token ids of each prompt, for the repetition penalty.
      outputs: token ids generated so far, for rows that go on; default none.
      features: decides which optional arrays exist and how wide they are.
      vocab_size: V, the width of the logits.
    """

    def column(name: str) -> np.ndarray:
        return np.array([getattr(p, name) for p in params], np.float32)

    bias_ids = bias_values = in_prompt = output_counts = None
    rows = len(params)
    if features.bias_width:
        bias_ids = np.full((rows, features.bias_width), vocab_size, np.int32)
        bias_values = np.zeros((rows, features.bias_width), np.float32)
        for row, p in enumerate(params):
            bias_ids[row, : len(p.logit_bias)] = list(p.logit_bias)
            bias_values[row, : len(p.logit_bias)] = list(p.logit_bias.values())
    if features.penalties:
        in_prompt = np.zeros((rows, vocab_size), bool)
        output_counts = np.zeros((rows, vocab_size), np.int32)
        for row, prompt in enumerate(prompts):
            in_prompt[row, np.asarray(prompt, np.int32)] = True
        for row, output in enumerate(outputs or ()):
            np.add.at(output_counts[row], np.asarray(output, np.int32), 1)
    top_p = column("top_p")
    return SamplerState(
        temperature=column("temperature"),
        top_k=np.array([p.top_k or _INT32_MAX for p in params], np.int32),
        top_p=np.where(top_p < 1, top_p, np.float32(np.inf)),
        min_p=column("min_p"),
        seed=np.array([(seed >> 32, seed & 0xFFFFFFFF) for seed in seeds], np.uint32).reshape(rows, 2),
        repetition_penalty=column("repetition_penalty"),
        frequency_penalty=column("frequency_penalty"),
        presence_penalty=column("presence_penalty"),
        bias_ids=bias_ids,
        bias_values=bias_values,
        in_prompt=in_prompt,
        output_counts=output_counts,
    )


def write_rows(state: SamplerState, slots: jax.Array, rows: SamplerState) -> SamplerState:
    """Put `rows`, built with the same features, into `slots`; a slot number of B or more is padding and is dropped."""
    return jax.tree.map(lambda whole, part: whole.at[slots].set(part, mode="drop"), state, rows)


def record_tokens(state: SamplerState, tokens: jax.Array, active: jax.Array) -> SamplerState:
    """Count `tokens` [B] as output of the rows where `active` [B] is true; needed by the penalties alone."""
    if state.output_counts is None:
        return state
    rows = jnp.arange(tokens.shape[0])
    counts = state.output_counts.at[rows, tokens].add(active.astype(jnp.int32))
    return dataclasses.replace(state, output_counts=counts)


def sample(
    logits: jax.Array,
    state: SamplerState,
    steps: jax.Array,
    mask: jax.Array | None = None,
    *,
    features: Features,
    valid_vocab: int,
) -> SampleOutput:
    """Choose the next token of every row; call it under `jax.jit`.

    Args:
      logits: [B, V], any float dtype.
      state: rows built with `features` or a superset of them.
      steps: [B] int32, the index of the token to generate within its own output: 0 is the first. The draw is a function
        of (seed, index, logits of the row) and of nothing else in the batch.
      features: the stages to run; static.
      valid_vocab: ids from here to V are never chosen nor listed; static.

    Returns:
      The tokens, and log-probabilities of the raw logits: normalised over all V, before bias, penalties, temperature
      and filters.
    """
    logits = logits.astype(jnp.float32)
    valid = jnp.arange(logits.shape[-1]) < valid_vocab  # [V]
    scores = logits
    if features.bias_width:
        rows = jnp.arange(logits.shape[0])[:, None]
        scores = scores.at[rows, state.bias_ids].add(state.bias_values, mode="drop")
    if features.penalties:
        scores = _penalise(scores, state)
    scores = jnp.where(valid, scores, -jnp.inf)
    if mask is not None:
        allowed = (mask[:, :, None] >> jnp.arange(32)) & 1  # [B, words, 32]
        scores = jnp.where(allowed.reshape(len(mask), -1)[:, : scores.shape[1]] == 1, scores, -jnp.inf)
    if features.random:
        scores = _randomise(scores, state, steps, features)
    tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)  # the lowest id on ties

    logprob = top_ids = top_logprobs = None
    if features.logprobs:
        normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)  # [B, 1]
        logprob = (jnp.take_along_axis(logits, tokens[:, None], axis=-1) - normaliser)[:, 0]
        if features.top_logprobs:
            top_logits, top_ids = lax.top_k(jnp.where(valid, logits, -jnp.inf), features.top_logprobs)
            top_logprobs = top_logits - normaliser
    return SampleOutput(tokens, logprob, top_ids, top_logprobs)


def _penalise(scores: jax.Array, state: SamplerState) -> jax.Array:
    """Apply the repetition penalty (Keskar et al. 2019, over prompt and output), then OpenAI's two (over output)."""
    in_output = state.output_counts > 0
    repetition = jnp.where(state.in_prompt | in_output, state.repetition_penalty[:, None], 1.0)
    scores = jnp.where(scores > 0, scores / repetition, scores * repetition)
    scores -= state.frequency_penalty[:, None] * state.output_counts
    return scores - state.presence_penalty[:, None] * in_output


def _randomise(scores: jax.Array, state: SamplerState, steps: jax.Array, features: Features) -> jax.Array:
    """Return scores whose argmax is a draw from the tempered, filtered distribution; greedy rows keep their argmax."""
    drawn = (state.temperature > 0)[:, None]
    # Subtracting the maximum first keeps tiny temperatures finite where it matters: the best token stays at 0.
    scores -= scores.max(axis=-1, keepdims=True)
    scores = scores / jnp.where(drawn, state.temperature[:, None], 1.0)
    scores = _filter(scores, state, features)
    return jnp.where(drawn, scores + _gumbel(state.seed, steps, scores.shape[-1]), scores)


def _gumbel(seed: jax.Array, steps: jax.Array, width: int) -> jax.Array:
    """Draw standard Gumbel noise [B, width] from one key per (seed, step)."""

    def row(data: jax.Array, step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(data, impl="threefry2x32"), step)
        # The default mode has 2^-23 steps where the winners of a flat 100,000-way draw lie, and would tie.
        return jax.random.gumbel(key, (width,), jnp.float32, mode="high")

    return jax.vmap(row)(seed, steps)


def _filter(scores: jax.Array, state: SamplerState, features: Features) -> jax.Array:
    """Set to -inf what top-k, top-p and min-p drop; `scores` [B, V] are at most 0, the maximum of each row is 0.

    Instead of sorting V entries, top-k and top-p find the score of the last token to keep, bit by bit. Scores equal in
    float32 stand or fall together.
    """
    if not (features.top_k or features.top_p or features.min_p):
        return scores
    # Scores have one sign, so the bits of their magnitude order them: from 0 for -inf to infinity's bits for 0.
    infinity = np.array(np.inf, np.float32).view(np.int32)
    keys = infinity - lax.bitcast_convert_type(jnp.abs(scores), jnp.int32)  # [B, V]
    weights = jnp.exp(scores)  # probabilities relative to the largest
    kept = jnp.ones_like(scores, bool)
    if features.top_k:
        last = _largest(lambda key: (keys >= key).sum(axis=-1, keepdims=True) >= state.top_k[:, None], keys)
        kept = keys >= last
    if features.top_p:
        # Never 0, so that the best token remains at top_p = 0.
        mass = jnp.where(kept, weights, 0.0)
        target = jnp.maximum(state.top_p[:, None] * mass.sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
        last = _largest(lambda key: jnp.where(keys >= key, mass, 0.0).sum(axis=-1, keepdims=True) >= target, keys)
        kept &= keys >= last
    if features.min_p:
        kept &= weights >= state.min_p[:, None]
    return jnp.where(kept, scores, -jnp.inf)


def _largest(reached: Callable[[jax.Array], jax.Array], keys: jax.Array) -> jax.Array:
    """Find per row the largest key >= 0 for which `reached`, true up to some key and false beyond, holds; else 0.

    `reached` maps [B, 1] int32 to [B, 1] bool. The answer is one of `keys` [B, V], as the predicate changes only there.
    """

    def try_bit(index: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (1 << (30 - index))
        return jnp.where(reached(candidate), candidate, found)

    return lax.fori_loop(0, 31, try_bit, jnp.zeros_like(keys[:, :1]))
