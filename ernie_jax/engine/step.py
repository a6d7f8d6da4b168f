"""The device side of the engine: one sharded, jitted forward step, and the sampler that follows it.

`forward` and `sample` are separate programs, so that work on the host (a grammar mask) can come between them. Both are
dispatched without waiting: the sampled token stays on the device, where the next step picks it up.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ernie_jax import sharding
from ernie_jax.engine.cache import PAGE_AXES
from ernie_jax.engine.sampling import Features, SampleOutput, SamplerState, record_tokens, sample, write_rows
from ernie_jax.model import Ernie
from ernie_jax.ops import RaggedBatch, paged_attention


@dataclasses.dataclass(frozen=True)
class StepShape:
    """The static shape of a step: T tokens, B rows, M pages a row, at most `query` new tokens a row."""

    tokens: int
    rows: int
    pages: int
    query: int


def pack(batch: RaggedBatch, slots: np.ndarray) -> np.ndarray:
    """Lay a host-side batch and the slot of each row out as one int32 vector [1, n]: one transfer a step."""
    fields = (batch.tokens, batch.positions, batch.rows, batch.starts, batch.kv_lengths, batch.page_table, slots)
    return np.concatenate([np.ravel(field) for field in fields]).astype(np.int32)[None]


def _unpack(packed: jax.Array, shape: StepShape) -> tuple[RaggedBatch, jax.Array]:
    sizes = (shape.tokens,) * 3 + (shape.rows + 1, shape.rows, shape.rows * shape.pages, shape.rows)
    tokens, positions, rows, starts, lengths, table, slots = jnp.split(packed, np.cumsum(sizes)[:-1])
    table = table.reshape(shape.rows, shape.pages)
    return RaggedBatch(tokens, positions, rows, starts, lengths, table, max_query=shape.query), slots


class DeviceStep:
    """Hold the weights as a flat list and run the model over the paged cache, one `jax.shard_map` around everything.

    The weights travel as a list of leaves because flattening a module costs more than a small step takes.
    """

    def __init__(self, model: Ernie, mesh: Mesh, expert_backend: str | None):
        graphdef, state = nnx.split(model)
        self._leaves, treedef = jax.tree.flatten(state)
        variables = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        specs = [sharding.spec(variable.get_metadata("axes")) for variable in variables]
        page_spec = [sharding.spec(PAGE_AXES)] * model.config.num_hidden_layers
        self._batch_sharding = NamedSharding(mesh, sharding.spec(("group", None)))
        self.traces = 0  # how often a step was compiled: tests hold it to the number of shapes

        def run(leaves, pages, last_tokens, packed, shape):
            self.traces += 1
            batch, slots = _unpack(packed[0], shape)  # this shard's data group
            row = jnp.minimum(batch.rows, shape.rows - 1)
            tokens = jnp.where(batch.tokens < 0, last_tokens[slots[row]], batch.tokens)
            model = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
            out = model(
                tokens, batch.positions, lambda *qkv: paged_attention(*qkv, batch), pages, expert_backend=expert_backend
            )
            return model, out, tokens, batch

        def forward(leaves, pages, last_tokens, packed, *, shape):
            model, out, _, batch = run(leaves, pages, last_tokens, packed, shape)
            return model.logits(out.hidden[batch.starts[1:] - 1]), out.caches  # of the last token of each row

        def score(leaves, pages, packed, targets, *, shape):
            model, out, _, _ = run(leaves, pages, jnp.zeros((1,), jnp.int32), packed, shape)
            logprobs = jax.nn.log_softmax(model.logits(out.hidden).astype(jnp.float32))
            return jnp.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0], out.caches

        def sharded(function, inputs):
            """Wrap in shard_map; outputs are one replicated array and the pages."""

            @functools.partial(jax.jit, static_argnames="shape", donate_argnames="pages")
            def call(leaves, pages, *args, shape):
                return jax.shard_map(
                    functools.partial(function, shape=shape),
                    mesh=mesh,
                    in_specs=(specs, page_spec, *inputs),
                    out_specs=(P(), page_spec),
                    check_vma=False,  # Pallas kernels carry no varying-axes types
                )(leaves, pages, *args)

            return call

        group = sharding.spec(("group", None))
        self._forward = sharded(forward, (P(), group))
        self._score = sharded(score, (group, P()))

    def forward(self, pages: list, last_tokens: jax.Array, batch: RaggedBatch, slots: np.ndarray):
        """Run a step; returns logits [B, V] of each row's last token, and the pages (donated)."""
        packed = jax.device_put(pack(batch, slots), self._batch_sharding)
        return self._forward(self._leaves, pages, last_tokens, packed, shape=_shape(batch))

    def score(self, pages: list, batch: RaggedBatch, targets: np.ndarray):
        """Run a step; returns log-probabilities [T] float32 of `targets` [T], each after its token, and the pages."""
        packed = jax.device_put(pack(batch, np.zeros_like(batch.kv_lengths)), self._batch_sharding)
        return self._score(self._leaves, pages, packed, targets, shape=_shape(batch))


def _shape(batch: RaggedBatch) -> StepShape:
    return StepShape(len(batch.tokens), *batch.page_table.shape, batch.max_query)


@functools.partial(jax.jit, static_argnames=("features", "valid_vocab"), donate_argnames=("state", "last_tokens"))
def sample_rows(
    logits: jax.Array,  # [B, V]
    state: SamplerState,  # one row a slot
    last_tokens: jax.Array,  # [slots] int32
    rows: jax.Array,  # [2, B] int32: slot of each row, and the index of the token it is to generate
    *,
    features: Features,
    valid_vocab: int,
) -> tuple[SampleOutput, SamplerState, jax.Array]:
    """Sample the next token of each row and put it where the next step finds it.

    A row whose slot number is out of range generates nothing: its output is to be ignored.
    """
    slots, steps = rows
    of_rows = jax.tree.map(lambda field: jnp.take(field, slots, axis=0, mode="clip"), state)
    out = sample(logits, of_rows, steps, features=features, valid_vocab=valid_vocab)
    if features.penalties:
        counted = record_tokens(of_rows, out.tokens, jnp.ones(slots.shape, bool))
        state = write_rows(state, slots, counted)
    return out, state, last_tokens.at[slots].set(out.tokens, mode="drop")


@functools.partial(jax.jit, donate_argnames="state")
def set_rows(state: SamplerState, slots: jax.Array, rows: SamplerState) -> SamplerState:
    """Write the sampler rows of sequences that just got their slots."""
    return write_rows(state, slots, rows)
