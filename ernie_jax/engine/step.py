"""The device side of the engine: one sharded, jitted forward step, and the sampler that follows it.

`forward` and `sample` are separate programs, so that work on the host (a grammar mask) can come between them. Both are
dispatched without waiting: the sampled token stays on the device, where the next step picks it up.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ernie_jax.engine.batching import NO_TOKEN, Step, StepShape, pack, packed_sizes, unpack
from ernie_jax.engine.cache import check_kv_dtype, page_specs
from ernie_jax.engine.sampling import Features, SampleOutput, SamplerState, record_tokens, sample, write_rows
from ernie_jax.kernels import compiling_for
from ernie_jax.model import Backends, Ernie, GroupRows
from ernie_jax.ops import (
    PagedAttention,
    StepNeeds,
    check_attention_backend,
    check_takes_quantized,
    default_attention_backend,
    default_exchange_backend,
    packed_attention,
    step_needs,
)
from ernie_jax.sharding import Layout

_BATCH_AXES = ("group", None)
_GROUP_AXES = ("group", None, None, None)
# On GPUs. In the graph of a decode step, kernels that do not need one another run side by side, as router and shared
# experts do. Of one token each waits for the one before, and on two H200 such a graph took the host 0.6 ms longer.
_DECODE_OPTIONS = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
# Of steps with prompts. Recording a graph of them takes the host longer than launching their kernels one by
# one, 8 ms of a prefill of 8,192 tokens by the 21B model on an H100, and most of their compiling went to Triton's
# products, built and timed beside those of cuBLAS.
_PROMPT_OPTIONS = {"xla_gpu_graph_min_graph_size": 1 << 30, "xla_gpu_enable_triton_gemm": False}


class StepOutput(NamedTuple):
    """What a step leaves on the devices.

    Attributes:
      logits: [B, V] of each row's last token, split by vocabulary.
      rows: [2, B] for `sample`.
      following: the decode step that follows for the same sequences.
      experts: [L, B, k] uint8 or int16, chosen for each row's last token in each layer with experts; where groups
        exchange tokens [G, L, B, k], of each group for its own rows. An empty tuple of a dense model.
    """

    logits: jax.Array
    rows: jax.Array
    following: jax.Array
    experts: jax.Array | tuple[()]


class DeviceStep:
    """Hold the weights as a flat list and run the model over the paged cache, one `jax.shard_map` around everything.

    The weights travel as a list of leaves because flattening a module costs more than a small step takes.

    Attributes:
      load: how many tokens have chosen each expert in all steps so far, for `read_load`: [1, 2, L, E] uint32, the low
        and the high words; where groups exchange tokens [G, 2, L, E], of each group for its own tokens. An array is
        never changed or donated. An empty tuple of a dense model.
    """

    def __init__(
        self,
        model: Ernie,
        layout: Layout,
        expert_backend: str | None = None,
        attention_backend: str | None = None,
        exchange_backend: str | None = None,
        linear_backend: str | None = None,
        router_backend: str | None = None,
        halves_backend: str | None = None,
        kv_dtype: jnp.dtype | None = None,
    ):
        """Prepare the steps of a model whose weights lie as `layout` says; abstract weights allow `lower` only.

        Backends are names of ops' tables; None chooses by platform, that of the experts also by the number of tokens.

        Args:
          kv_dtype: of the cache's pages; default: the model's.

        Raises:
          UserError: if the attention backend does not take the model's heads or the pages, or another its quantised
            weights.
        """
        config, platform = model.config, layout.platform
        if config.quantize:
            for op, backend in ("expert", expert_backend), ("linear", linear_backend):
                check_takes_quantized(op, backend, config.quantize)
        dtype = model.embed.dtype
        kv_dtype = jnp.dtype(dtype if kv_dtype is None else kv_dtype)
        check_kv_dtype(config, kv_dtype, layout, platform)
        heads = config.head_dim, dtype, config.num_key_value_heads // layout.size("kv_head"), kv_dtype
        self.attention_backend = attention_backend or default_attention_backend(platform, *heads)
        check_attention_backend(self.attention_backend, *heads)
        exchange_backend = exchange_backend or default_exchange_backend(platform)
        self.backends = Backends(
            expert_backend, exchange_backend, linear_backend, platform, router_backend, halves_backend
        )
        shard = layout.shard()
        self.exchanges = shard.exchanges
        graphdef, state = nnx.split(model)
        self._leaves, treedef = jax.tree.flatten(state)
        self._layout = layout
        variables = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        specs = [layout.spec(variable.get_metadata("axes")) for variable in variables]
        page_spec = page_specs(config, kv_dtype, layout)
        everywhere = layout.spec(())
        self._own_axes = _GROUP_AXES if self.exchanges else ()  # of what each group knows of its own tokens only
        self.traces = 0  # how often a step was compiled: tests hold it to the number of shapes
        self._no_load = ()
        if config.moe_layers:
            sizes = layout.groups if self.exchanges else 1, 2, len(config.moe_layers), config.moe_num_experts
            self._no_load = jax.ShapeDtypeStruct(sizes, jnp.uint32, sharding=layout.sharding(self._own_axes))
        if not isinstance(self._leaves[0], jax.ShapeDtypeStruct):
            self.reset_load()

        def run(leaves, pages, load, last_tokens, packed, shape):
            """Return the model, the hidden states [T, D] of all tokens, their experts, the new load, and the pages.

            The experts are [L, T, k], where tokens are exchanged of the group's window only.
            """
            self.traces += 1
            batch = packed.batch(shape)
            window = GroupRows(total=packed.total[0], count=packed.total[0])
            if layout.groups > 1:
                window = GroupRows(packed.start[0], packed.count[0], packed.total[0], shape.group_tokens)
            sampled = last_tokens[jnp.maximum(-1 - packed.tokens, 0)]
            used = packed.tokens != NO_TOKEN
            tokens = jnp.where(used, jnp.where(packed.tokens < 0, sampled, packed.tokens), 0)
            model = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
            out = model(
                tokens,
                batch.positions,
                PagedAttention(batch, self.attention_backend),
                pages,
                backends=self.backends,
                shard=shard,
                rows=window,
            )
            experts = ()
            if out.routing:
                experts = jnp.stack([routed.experts for routed in out.routing])
                if shard.exchanges:
                    used = window.take(used) & (jnp.arange(experts.shape[1]) < window.count)
                load = add_load(load, jnp.where(used[:, None], experts, -1))
            return model, whole(out.hidden, window, shape.tokens), experts, load, out.caches

        def add_load(load, experts):
            """Count experts [L, T, k] in; -1 is none."""
            chosen = experts.reshape(len(experts), -1, 1) == jnp.arange(config.moe_num_experts)
            counts = chosen.sum(1, dtype=jnp.uint32)
            low, high = load[0]
            low += counts
            return jnp.stack([low, high + (low < counts)])[None]

        def forward(leaves, pages, load, last_tokens, packed, *, shape):
            packed = unpack(packed[0], shape)  # this shard's data group
            model, hidden, experts, load, pages = run(leaves, pages, load, last_tokens, packed, shape)
            output = StepOutput(
                model.logits(hidden[packed.last], self.backends),
                jnp.stack([packed.slots, packed.indices]),
                jnp.concatenate(packed.advance())[None],
                of_rows(experts, packed) if len(experts) else (),
            )
            return (output, load), pages

        def of_rows(experts, packed):
            """Return the experts of each row's last token; where they are exchanged zeros for other groups' rows."""
            experts = experts.astype(jnp.uint8 if config.moe_num_experts <= 256 else jnp.int16)
            if not shard.exchanges:
                return experts[:, packed.last]
            place = packed.last - packed.start
            mine = (place >= 0) & (place < packed.count)
            return jnp.where(mine[:, None], experts[:, jnp.where(mine, place, 0)], 0)[None]

        def score(leaves, pages, load, packed, targets, *, shape):
            packed = unpack(packed[0], shape)
            model, hidden, _, load, pages = run(leaves, pages, load, jnp.zeros((1,), jnp.int32), packed, shape)
            logits = model.logits(hidden, self.backends).astype(jnp.float32)  # of this shard's slice of the vocabulary
            largest = shard.max(logits.max(-1), "vocab")
            total = shard.sum(jnp.exp(logits - largest[:, None]).sum(-1), "vocab")
            column = targets - shard.index("vocab") * logits.shape[1]
            mine = (column >= 0) & (column < logits.shape[1])
            target = jnp.take_along_axis(logits, jnp.where(mine, column, 0)[:, None], axis=-1)[:, 0]
            target = shard.sum(jnp.where(mine, target, 0), "vocab")
            return (target - largest - jnp.log(total), load), pages

        def logits(leaves, tokens):
            """Run whole sequences without a cache; the first group computes their attention."""
            model = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
            length = len(tokens)
            window = GroupRows()
            if layout.groups > 1:
                count = jnp.where(shard.index("group") == 0, length, 0)
                window = GroupRows(jnp.int32(0), count, jnp.int32(length), length)

            def attend(q, k, v, cache):
                return packed_attention(q[None], k[None], v[None], jnp.zeros((1, length), jnp.int32))[0], cache

            with compiling_for(layout.capability):
                out = model(tokens, jnp.arange(length), attend, backends=self.backends, shard=shard, rows=window)
                return model.logits(whole(out.hidden, window, length), self.backends)

        def whole(hidden, window, tokens):
            """Return rows of all tokens, also where each group keeps its own."""
            if shard.exchanges:
                hidden = shard.sum(window.spread(hidden, tokens), "group")
            return hidden

        def sharded(function, inputs, output, options=None, donated=(1,)):
            """Wrap in shard_map; what comes out is the output with the new load, and the pages."""

            @functools.partial(jax.jit, static_argnames="shape", donate_argnums=donated, compiler_options=options)
            def call(leaves, pages, load, *args, shape):
                with compiling_for(layout.capability):
                    return jax.shard_map(
                        functools.partial(function, shape=shape),
                        mesh=layout.mesh,
                        in_specs=(specs, page_spec, load_spec, *inputs),
                        out_specs=((output, load_spec), page_spec),
                        check_vma=False,  # Pallas kernels carry no varying-axes types
                    )(leaves, pages, load, *args)

            return call

        group, load_spec = layout.spec(_BATCH_AXES), layout.spec(self._own_axes)
        output = StepOutput(layout.spec((None, "vocab")), everywhere, group, load_spec)
        of_some, of_prompts = (_DECODE_OPTIONS, _PROMPT_OPTIONS) if platform == "gpu" else (None, None)
        # The integers of a step are donated to those of the step that follows.
        self._decode_one, self._decode = (
            sharded(forward, (everywhere, group), output, options, donated=(1, 4)) for options in (None, of_some)
        )
        self._prompt = sharded(forward, (everywhere, group), output, of_prompts)
        self._score = sharded(score, (group, everywhere), everywhere)
        here = layout.sharding()
        self._logits = jax.jit(
            jax.shard_map(
                logits,
                mesh=layout.mesh,
                in_specs=(specs, everywhere),
                out_specs=layout.spec((None, "vocab")),
                check_vma=False,
            ),
            out_shardings=here,
        )
        self._sample = jax.jit(
            functools.partial(_sample_rows, layout),
            static_argnames=("features", "valid_vocab"),
            donate_argnames=("state", "last_tokens"),
            out_shardings=here,
        )
        self.set_rows = jax.jit(write_rows, donate_argnums=0, out_shardings=here)
        self._gather_experts = jax.jit(lambda experts: experts.sum(0, dtype=experts.dtype), out_shardings=here)

    def needs(self, page_size: int) -> StepNeeds:
        """Return what attention over such pages asks of a step's shape."""
        with compiling_for(self._layout.capability):
            return step_needs(self.attention_backend, page_size)

    def place(self, packed: np.ndarray) -> jax.Array:
        """Bring a step, as `pack` lays it out, to the devices."""
        return self._layout.put(packed, _BATCH_AXES)

    def forward(
        self, pages: list, last_tokens: jax.Array, packed: jax.Array, shape: StepShape
    ) -> tuple[StepOutput, list]:
        """Run a step that was placed, or that follows another.

        Returns:
          A StepOutput and the pages; those given are donated, and of a decode step `packed` too.
        """
        run = self._forward(shape)
        (out, self.load), pages = run(self._leaves, pages, self.load, last_tokens, packed, shape=shape)
        return out, pages

    def score(self, pages: list, step: Step, targets: np.ndarray) -> tuple[jax.Array, list]:
        """Run a step; returns log-probabilities [T] float32 of `targets` [T], each after its token, and the pages."""
        placed = self.place(pack(step)), self._layout.put(targets)
        (logprobs, self.load), pages = self._score(self._leaves, pages, self.load, *placed, shape=step.shape)
        return logprobs, pages

    def gather_experts(self, experts: jax.Array) -> jax.Array:
        """Return the experts [L, B, k] of a step's rows, of its StepOutput, on a device of this process."""
        experts = self._gather_experts(experts) if self.exchanges else experts
        return experts.addressable_data(0)

    def reset_load(self) -> None:
        """Count experts from nothing again."""
        self.load = jax.tree.map(lambda x: self._layout.put(np.zeros(x.shape, x.dtype), self._own_axes), self._no_load)

    @staticmethod
    def read_load(load: jax.Array) -> np.ndarray:
        """Return the counts [L, E] int64 of an earlier or the present `load`.

        Of several processes each returns a part of it: process 0 all, unless groups exchange tokens.
        """
        parts = [np.asarray(part.data, np.int64) for part in load.addressable_shards if part.replica_id == 0]
        return sum((low + (high << 32) for [(low, high)] in parts), np.zeros(load.shape[2:], np.int64))

    def logits(self, tokens: np.ndarray) -> jax.Array:
        """Return the logits [T, V] after each token of one sequence [T], without the cache."""
        return self._logits(self._leaves, self._layout.put(tokens))

    def sample(
        self,
        logits: jax.Array,
        state: SamplerState,
        last_tokens: jax.Array,
        rows: jax.Array,
        mask: jax.Array | None = None,
        *,
        features: Features,
        valid_vocab: int,
    ) -> tuple[SampleOutput, SamplerState, jax.Array]:
        """Sample the next token of each row and put it where the next step finds it.

        A row whose slot number is out of range generates nothing: its output is to be ignored.

        Args:
          logits: [B, V].
          state: one row a slot; donated.
          last_tokens: [slots] int32; donated.
          rows: [2, B] int32, the slot of each row and the index of the token it is to generate.
          mask: [B, ceil(V / 32)] int32, the tokens allowed in each row, as bits; default: all.
        """
        return self._sample(logits, state, last_tokens, rows, mask, features=features, valid_vocab=valid_vocab)

    def lower(self, shape: StepShape, pages: list[jax.ShapeDtypeStruct], slots: int) -> jax.stages.Lowered:
        """Lower the forward step for compilation ahead of time."""
        last_tokens = jax.ShapeDtypeStruct((slots,), jnp.int32, sharding=self._layout.sharding())
        packed = jax.ShapeDtypeStruct(
            (self._layout.groups, sum(packed_sizes(shape))), jnp.int32, sharding=self._layout.sharding(_BATCH_AXES)
        )
        return self._forward(shape).lower(self._leaves, pages, self._no_load, last_tokens, packed, shape=shape)

    def _forward(self, shape: StepShape):
        """Return the jitted step for a shape."""
        if shape.query > 1:
            return self._prompt
        return self._decode if shape.tokens > 1 else self._decode_one

    def lower_sample(self, logits, state, last_tokens, rows, mask=None, *, features: Features, valid_vocab: int):
        """Lower the sampler; arguments are those of `sample`, or their shapes with shardings."""
        return self._sample.lower(logits, state, last_tokens, rows, mask, features=features, valid_vocab=valid_vocab)


def _sample_rows(layout, logits, state, last_tokens, rows, mask=None, *, features, valid_vocab):
    slots, steps = rows
    if features != Features() or mask is not None:
        # A search through the whole vocabulary: gather the logits once, not at every stage.
        logits = jax.lax.with_sharding_constraint(logits, layout.sharding())
    of_rows = jax.tree.map(lambda field: jnp.take(field, slots, axis=0, mode="clip"), state)
    out = sample(logits, of_rows, steps, mask, features=features, valid_vocab=valid_vocab)
    if features.penalties:
        counted = record_tokens(of_rows, out.tokens, jnp.ones(slots.shape, bool))
        state = write_rows(state, slots, counted)
    return out, state, last_tokens.at[slots].set(out.tokens, mode="drop")
