"""LLM: text or token ids in, completions out; the façade over tokenizer, checkpoint and engine."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from ernie_jax import adapter as adapters
from ernie_jax import checkpoint
from ernie_jax.config import ModelConfig, read_json
from ernie_jax.engine import Engine, EngineOptions, FinishReason, SamplingParams, TokenEvent
from ernie_jax.engine.cache import kv_name
from ernie_jax.errors import UserError
from ernie_jax.model import Ernie, abstract_model, initialize
from ernie_jax.paths import storage_path
from ernie_jax.sharding import Layout, make_layout, shard_bytes, usable_devices
from ernie_jax.text import ChatTemplate, TextStream, Tokenizer, check_vocabulary

# Text, token ids, chat messages, or {"messages": [...], "tools": [...]}.
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any]

_GENERATION_FIELDS = ("temperature", "top_p", "top_k", "repetition_penalty", "frequency_penalty", "presence_penalty")


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a prompt was continued with.

    Attributes:
      text: the new text, without stop token or stop string; None if the checkpoint has no tokenizer.
      token_ids: the new ids, the stop id included.
      finish_reason: "stop" (a stop id or string) or "length".
      prompt_tokens: how many ids the prompt had.
      logprobs: log-probability of each new token, if asked for.
      top_logprobs: for each new token the likeliest (id, log-probability) pairs, if asked for.
    """

    text: str | None
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: list[float] | None = None
    top_logprobs: list[tuple[tuple[int, float], ...]] | None = None


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer: text that is now certain, and on the last piece the whole Completion."""

    index: int
    text: str
    completion: Completion | None


@dataclasses.dataclass(frozen=True)
class Score:
    """Token ids and the log-probability of each given those before; None for the first."""

    token_ids: list[int]
    logprobs: list[float | None]


class LLM:
    """A model ready to generate. Make one with `load`, or `random` for a model without weights.

    Attributes:
      model: the bare Flax NNX model, for `ernie_jax.forward` and everything else.
      config: its ModelConfig.
      tokenizer: None if the checkpoint has none; then only token ids go in and out.
      generation_config: fields of the checkpoint's generation_config.json.
    """

    def __init__(self, model: Ernie, layout: Layout, directory: epath.Path | None, options: EngineOptions):
        self.model = model
        self.config = model.config
        self.layout = layout
        self.tokenizer: Tokenizer | None = None
        self.template: ChatTemplate | None = None
        self.generation_config: dict = {}
        eos: list = [self.config.eos_token_id]
        if directory is not None:
            self.generation_config = _optional_json(directory / "generation_config.json")
            eos += [
                fields.get("eos_token_id") for fields in (self.generation_config, read_json(directory / "config.json"))
            ]
            if any((directory / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
                self.tokenizer = Tokenizer.load(directory)
                check_vocabulary(self.tokenizer, self.config)
                self.template = ChatTemplate.load(directory, self.tokenizer)
        if self.tokenizer:
            stop_ids = self.tokenizer.stop_ids(*eos)
        else:
            lists = [[ids] if isinstance(ids, int) else ids or [] for ids in eos]
            stop_ids = frozenset(itertools.chain(*lists))
        valid_vocab = self.tokenizer.vocab_size if self.tokenizer else self.config.vocab_size
        self.engine = Engine(model, layout, options, valid_vocab=valid_vocab, stop_ids=stop_ids)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        dtype: str | None = None,
        progress: bool = False,
        mesh: str | None = None,
        sharding: str | None = None,
        adapter: str | os.PathLike | None = None,
        **options: Any,
    ) -> LLM:
        """Load a converted checkpoint, local or gs://, onto all accelerators, or one CPU.

        Args:
          mesh: how many devices share what, as "expert:8" or "data:2,expert:4"; default: by `sharding`.
          sharding: a name of sharding.PRESETS; default: by the model and the number of devices.
          dtype: of weights, and of the cache without a kv_dtype: bfloat16, float32 or float16; default: the
            checkpoint's. Routers stay float32.
          progress: show a bar while restoring.
          adapter: directory of an adapter that was trained on this model. It is added to the weights in memory;
            quantised ones stay as they are, and it is computed beside them.
          **options: fields of EngineOptions, such as cache_tokens, kv_dtype and max_sequences.

        Raises:
          UserError: if the directory is no converted checkpoint (nothing is converted here), or does not fit, or the
            adapter is for another model.
        """
        directory, options = storage_path(directory), EngineOptions(**options)
        weights = checkpoint.parse_dtype(dtype or checkpoint.read_manifest(directory)["dtype"])
        config = checkpoint.read_config(directory)
        layout = choose_layout(config, mesh, sharding)
        _check_weights_fit(config, weights, layout, layout.mesh.local_devices)
        trained = adapters.load(adapter) if adapter else None
        model = checkpoint.restore(directory, layout, weights, progress)
        if trained:
            adapters.check(trained, model, checkpoint.read_manifest(directory), str(adapter))
            if config.quantize:
                adapters.attach(model, trained, layout, weights)
            else:
                adapters.merge(model, trained, layout)
        return cls(model, layout, directory, options)

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        dtype: str = "bfloat16",
        seed: int = 0,
        mesh: str | None = None,
        sharding: str | None = None,
        tokenizer: str | os.PathLike | None = None,
        **options: Any,
    ) -> LLM:
        """Make a model with random weights, drawn on the devices: for sizing, timing and tests.

        Args and errors are those of `load`.

        Args:
          tokenizer: a model's directory whose tokenizer, chat template and stop ids it borrows; default: none.
        """
        options, layout = EngineOptions(**options), choose_layout(config, mesh, sharding)
        model = Ernie(config, checkpoint.parse_dtype(dtype))
        _check_weights_fit(config, checkpoint.parse_dtype(dtype), layout, layout.mesh.local_devices)
        initialize(model, layout, seed)
        return cls(model, layout, None if tokenizer is None else storage_path(tokenizer), options)

    def sampling_params(self, **fields: Any) -> SamplingParams:
        """Return the checkpoint's recommended sampling settings with `fields` in place of its own."""
        recommended = {n: self.generation_config[n] for n in _GENERATION_FIELDS if self.generation_config.get(n)}
        if self.generation_config.get("do_sample") is False:
            recommended["temperature"] = 0.0
        return SamplingParams.from_dict({**recommended, **{n: v for n, v in fields.items() if v is not None}})

    def encode(self, prompt: Prompt) -> list[int]:
        """Turn text, messages or token ids into token ids.

        Raises:
          UserError: if the prompt is empty, malformed, or text without a tokenizer.
        """
        if not isinstance(prompt, str) and not _is_chat(prompt):
            try:
                return [operator.index(token) for token in prompt]
            except TypeError:
                raise UserError("a prompt must be a text, a list of token ids, or a list of messages") from None
        if self.tokenizer is None:
            raise UserError("this checkpoint has no tokenizer; give token ids")
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        conversation = prompt if isinstance(prompt, Mapping) else {"messages": prompt}
        if "messages" not in conversation:
            raise UserError(f"a prompt with the fields {', '.join(conversation)} lacks messages")
        return self.tokenizer.encode(self.template.render(**conversation))

    def check(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """Check a prompt and its settings without generating; returns the prompt's token ids.

        Raises:
          UserError: if `generate` would refuse them.
        """
        ids = self.encode(prompt)
        self.engine.check(ids, params)
        if params.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer, which this checkpoint lacks; use stop_token_ids")
        return ids

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Continue every prompt; many at once, of any lengths.

        Args:
          prompts: each a text, a list of token ids, a list of chat messages, or messages with tools.
          params: one for all or one for each; default: `sampling_params()`.

        Raises:
          UserError: if a prompt or a setting is bad; nothing is generated then.
          RuntimeError: while a stream of this LLM is open.
        """
        completions: list[Completion | None] = [None] * len(prompts)
        for chunk in self.stream(prompts, params):
            if chunk.completion:
                completions[chunk.index] = chunk.completion
        return completions

    def stream(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        keep: frozenset[int] = frozenset(),
    ) -> Iterator[Chunk]:
        """Continue every prompt like `generate`, yielding text as it comes; closing the iterator stops the work.

        Args:
          keep: ids that are text even if special, such as the tags that an AnswerParser looks for.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list; for one text pass [text]")
        if self.engine.has_work:
            raise RuntimeError("a stream of this LLM is open: read it to its end or close it first")
        if params is None or isinstance(params, SamplingParams):
            params = [params or self.sampling_params()] * len(prompts)
        encoded = [self.check(prompt, settings) for prompt, settings in zip(prompts, params, strict=True)]
        streams = {}
        for index, (prompt, ids, settings) in enumerate(zip(prompts, encoded, params, strict=True)):
            request = self.engine.submit(ids, settings)
            streams[request] = _Stream(index, len(ids), settings, self.tokenizer, _is_chat(prompt), keep)
        try:
            while streams:
                for event in self.engine.step():
                    if stream := streams.get(event.request):
                        chunk = stream.push(event)
                        if chunk.completion:
                            self.engine.cancel(event.request)  # a stop string: the engine does not know it ended
                            del streams[event.request]
                        if chunk.text or chunk.completion:
                            yield chunk
        finally:
            for request in streams:
                self.engine.cancel(request)
            while self.engine.has_work:  # surplus steps in flight: let them land, and the engine is idle again
                self.engine.step()

    def score(self, texts: Sequence[str | Sequence[int]]) -> list[Score]:
        """Return the log-probability of every token of each text given those before it.

        Raises:
          UserError: if a text is empty or too long.
        """
        return [score for _, score in sorted(self.iter_score(texts), key=lambda item: item[0])]

    def iter_score(self, texts: Sequence[str | Sequence[int]]) -> Iterator[tuple[int, Score]]:
        """Yield (index, Score) of each text as it is done."""
        encoded = [self.encode(text) for text in texts]
        for index, logprobs in self.engine.score(encoded):
            yield index, Score(encoded[index], [None, *logprobs])

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Return the logits [T, V] float32 after each token of a sequence."""
        return self.engine.logits(token_ids)

    def describe(self) -> str:
        """Say in one line what runs where: devices, sharding, dtype, op backends, cache."""
        devices, engine = self.layout.mesh.devices.ravel(), self.engine
        groups = f" in each of {self.layout.groups} data groups" if self.layout.groups > 1 else ""
        cached = f"{kv_name(engine.kv_dtype)} " if engine.kv_dtype != engine.dtype else ""
        return (
            f"{len(devices)} x {devices[0].device_kind} · sharding {self.layout.describe()} · "
            f"{jnp.dtype(engine.dtype).name} · {engine.describe_ops()} · "
            f"{cached}cache {engine.group_tokens:,} tokens{groups} in pages of {engine.options.page_size} · "
            f"up to {engine.options.max_sequences} sequences"
        )


class _Stream:
    """Turn the token events of one request into text chunks and at last a Completion."""

    def __init__(
        self,
        index: int,
        prompt_tokens: int,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        chat: bool,
        keep: frozenset[int],
    ):
        self._index = index
        self._prompt_tokens = prompt_tokens
        self._params = params
        self._stream = TextStream(tokenizer, params.stop, strip_space=chat, keep=keep) if tokenizer else None
        self._text: list[str] = []
        self._events: list[TokenEvent] = []

    def push(self, event: TokenEvent) -> Chunk:
        self._events.append(event)
        reason, text = event.finish_reason, ""
        if self._stream:
            text = self._stream.push(None if reason == "stop" else event.token, last=bool(reason))
            if self._stream.stopped:
                reason = "stop"
        self._text.append(text)
        return Chunk(self._index, text, self._completion(reason) if reason else None)

    def _completion(self, reason: FinishReason) -> Completion:
        return Completion(
            text="".join(self._text) if self._stream else None,
            token_ids=[event.token for event in self._events],
            finish_reason=reason,
            prompt_tokens=self._prompt_tokens,
            logprobs=[event.logprob for event in self._events] if self._params.logprobs else None,
            top_logprobs=[event.top_logprobs for event in self._events] if self._params.top_logprobs else None,
        )


def _is_chat(prompt: Prompt) -> bool:
    """Tell messages from text and token ids."""
    messages = isinstance(prompt, Sequence) and any(isinstance(message, Mapping) for message in prompt)
    return messages or isinstance(prompt, Mapping)


def choose_layout(config: ModelConfig, mesh: str | None = None, sharding: str | None = None) -> Layout:
    """Spread a model over the devices of all processes, as asked or by default.

    The default takes the most devices that the model divides over. CPUs are one device, or one a process: virtual ones
    share the same cores, so they are used only when asked for.

    Raises:
      UserError: as `sharding.make_layout`, or if a process has none of the devices.
    """
    devices = jax.devices()
    if mesh is None and sharding is None:
        if devices[0].platform == "cpu" and jax.process_count() == 1:
            devices = devices[:1]
        devices = devices[: usable_devices(config, len(devices))]
    layout = make_layout(config, devices, mesh, sharding)
    used = {device.process_index for device in layout.mesh.devices.flat}
    if idle := sorted(set(range(jax.process_count())) - used):
        raise UserError(
            f"sharding {layout.describe()} takes {layout.mesh.size} of {len(jax.devices())} devices and none of "
            f"process {idle[0]}'s; start fewer processes, or choose --mesh and --sharding so that all have a part"
        )
    return layout


def _check_weights_fit(config: ModelConfig, dtype: jnp.dtype, layout: Layout, devices: Sequence[jax.Device]) -> None:
    """Refuse weights of which a device's part exceeds its free memory, where the devices tell (CPUs do not)."""
    need = shard_bytes(nnx.state(abstract_model(config, dtype, layout)))
    for device in devices:
        stats = device.memory_stats() or {}
        free = stats.get("bytes_limit", math.inf) - stats.get("bytes_in_use", 0)
        if need > free:
            raise UserError(
                f"the weights take {need / 1e9:.1f} GB a device in {dtype.name} with sharding {layout.describe()}, and "
                f"{device.device_kind} has {free / 1e9:.1f} GB free; use a smaller --dtype, more devices or larger ones"
            )


def _optional_json(path: epath.Path) -> dict:
    return read_json(path) if path.exists() else {}


load = LLM.load
