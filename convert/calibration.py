"""Calibration: what goes into each linear layer on some text, so that GPTQ can round it.

A layer is rounded after those below it, on what these make of the text once rounded, and within a layer in the order of
the computation. Nothing of the source is held: what is rounded is read back from the target, so that a conversion taken
up again computes the same activations from what it finds there.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import pathlib
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from convert.arrays import Arrays
from convert.chunks import CHUNK_BYTES, Chunk, Parameter, Rounding, nearest
from convert.gptq import factor, gram, round_to
from convert.source import ForeignModel
from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.model.layers import MLP, DecoderLayer, Experts, MoE, RMSNorm, Router, rotary_angles
from ernie_jax.ops import Quantized, dequantize, einsum, packed_attention, swiglu
from ernie_jax.text import Tokenizer
from ernie_jax.train.data import Batch, Part, TrainingData
from ernie_jax.train.documents import Documents
from ernie_jax.train.sources import Source, read_files

LENGTH = 1024  # tokens of a row
MOST_ROWS = 128
LEAST_TOKENS = 4096
_ROWS = 4  # that go through a layer at a time
_EXPERTS = 16  # that "blocks" multiplies at a time
_TOKENS = 4096  # of an expert that are looked at at a time
# The linear layers of a decoder layer, in the order of the computation.
_STAGES = (
    ("attention.qkv",),
    ("attention.out",),
    ("mlp.gate_up", "mlp.shared.gate_up", "mlp.experts.gate_up"),
    ("mlp.down", "mlp.shared.down", "mlp.experts.down"),
)


Inputs = Callable[[int | None], Iterable[tuple[jax.Array, jax.Array]]]  # of an expert: x [T, in] and weights [T]


class Stage(NamedTuple):
    """Chunks that can be written at the same time, how they are rounded, and what the user is told of it."""

    chunks: list[Chunk]
    rounding: Rounding
    label: str = ""


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """The rows of a text.

    Attributes:
      batches: with _ROWS rows each.
      digest: SHA-256 of the file.
    """

    batches: list[Batch]
    digest: str

    @property
    def tokens(self) -> int:
        """Count those that are no padding."""
        return sum(int((batch.segments >= 0).sum()) for batch in self.batches)


def read_text(path: str, model: ForeignModel) -> CalibrationText:
    """Read a text as a model's tokenizer sees it; of a long one MOST_ROWS rows, evenly from all of it.

    Args:
      path: plain text (.txt), JSON lines of any format that training takes, or token ids (.npy).

    Raises:
      UserError: if it is missing, broken or too short.
    """
    with contextlib.ExitStack() as stack:
        directory = str(model.source.root)
        if model.source.is_remote:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ernie_jax-"))
            for name, content in model.small_files.items():
                (pathlib.Path(directory) / name).write_bytes(content)
        documents, digest = _read(path, directory, model.config)
    if (tokens := int(documents.lengths.sum())) < LEAST_TOKENS:
        raise UserError(f"--calibration={path}: has {tokens:,} tokens; give a text of at least {LEAST_TOKENS:,}")
    data = TrainingData([Part((documents,))], 1, LENGTH, None)
    rows = data.steps(1)
    chosen = [i * rows // min(rows, MOST_ROWS) for i in range(min(rows, MOST_ROWS))]
    found = [data.batch(step) for step in chosen]
    found += [data.batch(rows - 1)._replace(segments=np.full((1, LENGTH), -1, np.int32))] * (-len(found) % _ROWS)
    batches = itertools.batched(found, _ROWS)
    return CalibrationText([Batch(*map(np.concatenate, zip(*rows, strict=True))) for rows in batches], digest)


def _read(path: str, directory: str, config: ModelConfig) -> tuple[Documents, str]:
    if not path.endswith(".txt"):
        (file,) = read_files([Source("calibration", path)], "", directory, config, LENGTH, "truncate")
        if file.bad:
            number, reason = file.bad[0]
            raise UserError(f"--calibration={path}, {file.unit} {number}: {reason}")
        return file.sides[0], file.digest
    try:
        content = pathlib.Path(path).expanduser().read_bytes()
        text = content.decode()
    except OSError as error:
        raise UserError(f"--calibration={path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--calibration={path}: not UTF-8 at byte {error.start}") from None
    tokens = np.array(Tokenizer.load(directory).encode(text), np.int32)
    whole = Documents(tokens, np.zeros(1, np.int64), np.array([len(tokens)]), None)
    return whole, hashlib.sha256(content).hexdigest()


def memory(text: CalibrationText, config: ModelConfig, parameters: list[Parameter]) -> tuple[int, int]:
    """Return how many bytes it takes to calibrate: once, and in each thread."""
    activations = len(text.batches) * _ROWS * LENGTH * config.hidden_size * 4
    layers = collections.Counter()
    for parameter in parameters:
        layers[parameter.path.split(".mlp.")[0].split(".attention.")[0]] += parameter.nbytes
    widest = max(config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim)
    experts = 3 * config.hidden_size * max(config.intermediate_size, _EXPERTS * config.moe_intermediate_size)
    # The activations before and after a norm, and while they are put together; a layer as stored, and what of its
    # weights is unpacked at a time; H, its factor and what is between. In each thread a chunk of weights, in float32.
    return 3 * activations + max(layers.values()) + 8 * experts + 16 * widest**2, 4 * CHUNK_BYTES


class Calibration:
    """The text on its way through the layers of a target."""

    def __init__(self, text: CalibrationText, config: ModelConfig, directory: epath.Path):
        """Begin.

        Args:
          config: of the target, which is in `directory`.
        """
        self._text, self._config, self._directory = text, config, directory
        self._counted = jnp.stack([batch.segments.reshape(-1) >= 0 for batch in text.batches]).astype(jnp.float32)
        self._x: list[jax.Array] = []  # [_ROWS, LENGTH, D] of each batch

    def stages(self, chunks: Iterable[Chunk]) -> Iterator[Stage]:
        """Order the chunks that are to be written; those of a stage must be when the next is asked for."""
        by_place: dict[tuple[int, int], list[Chunk]] = {}
        layers = self._config.num_hidden_layers
        for chunk in chunks:
            top, *rest = chunk.parameter.path.split(".", 2)
            place = (int(rest[0]), _stage(rest[1])) if top == "layers" else (0 if top == "embed" else layers, -1)
            by_place.setdefault(place, []).append(chunk)
        last = max((layer for layer, stage in by_place if stage >= 0), default=-1)
        for layer in range(layers):
            label = f"layer {layer + 1} of {layers}"
            yield Stage(by_place.get((layer, -1), []), nearest, label)
            if layer <= last:
                for stage, rounding in enumerate(self._pass(layer)):
                    yield Stage(by_place.get((layer, stage), []), rounding, label)
        yield Stage(by_place.get((layers, -1), []), nearest, "the rest")

    def _pass(self, index: int) -> Iterator[Rounding]:
        """Take the text through a layer; yield how each stage of it is rounded."""
        if not index:
            (table,) = self._read(["embed.weight"])
            if self._config.quantize_embedding:
                table = Quantized(table, *self._read(["embed.scale"]))
            rows = (table[batch.tokens] for batch in self._text.batches)
            self._x = [jnp.asarray(dequantize(x) if isinstance(x, Quantized) else x, jnp.float32) for x in rows]
        layer = DecoderLayer(self._config, jnp.float32, self._config.is_moe_layer(index))
        # What the target does not have yet is zero.
        nnx.update(layer, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nnx.state(layer)))
        self._fill(layer, index, -1)

        def normed(_) -> Iterator[tuple[jax.Array, jax.Array]]:
            return self._weighted(_norm(layer.input_norm, x) for x in self._x)

        def attended(_) -> Iterator[tuple[jax.Array, jax.Array]]:
            return self._weighted(inputs for _, inputs in self._attend(layer))

        yield self._rounding(index, {"attention.qkv": normed})
        self._fill(layer, index, 0)
        yield self._rounding(index, {"attention.out": attended})
        self._fill(layer, index, 1)
        for i, (x, _) in enumerate(self._attend(layer)):
            self._x[i] = x
        h = jnp.concatenate([_norm(layer.post_attention_norm, x) for x in self._x])
        mlps, inputs, inner = {"mlp": layer.mlp}, {}, {}
        if isinstance(layer.mlp, MoE):
            mlps = {"mlp.shared": layer.mlp.shared} if hasattr(layer.mlp, "shared") else {}
            routing = [jax.device_get(_route(layer.mlp.router, part)) for part in self._parts(h)]
            chosen, weights = (np.concatenate(found) for found in zip(*routing, strict=True))
            weights *= np.asarray(self._counted).reshape(-1, 1)
            experts = _ExpertTokens(layer.mlp.experts, h, chosen, weights)
            inputs["mlp.experts.gate_up"], inner["mlp.experts.down"] = experts.inputs, experts.inner
        for name, mlp in mlps.items():
            inputs[f"{name}.gate_up"] = lambda _: self._weighted(self._parts(h))
            inner[f"{name}.down"] = lambda _, mlp=mlp: self._weighted(_inner(mlp, part) for part in self._parts(h))
        yield self._rounding(index, inputs)
        self._fill(layer, index, 2)
        yield self._rounding(index, inner)
        self._fill(layer, index, 3)
        for i, part in enumerate(self._parts(h)):
            self._x[i] = _add(layer.mlp, self._x[i], part)

    def _rounding(self, index: int, inputs: dict[str, Inputs]) -> Rounding:
        """Return what rounds the linear layers of a stage, given what goes into each."""
        lock = threading.Lock()

        @functools.lru_cache(maxsize=4)  # chunks of the same expert come one after the other
        def find(name: str, expert: int | None) -> jax.Array:
            found = factor(sum(gram(x, weights) for x, weights in inputs[name](expert)))
            if not np.isfinite(found).all():
                raise UserError(f"layers.{index}.{name}: what --calibration makes of its inputs is not finite")
            return found

        def rounding(chunk: Chunk, weights: np.ndarray) -> Quantized:
            name = chunk.parameter.path.split(".", 2)[2].removesuffix(".weight")
            with lock:
                found = find(name, int(chunk.key.split(".")[0]) if ".experts." in name else None)
            return round_to(weights.reshape(-1, len(found)), found, weights.size // chunk.scales.size, chunk.form)

        return rounding

    def _parts(self, h: jax.Array) -> Iterator[jax.Array]:
        """Cut [all tokens, D] into the batches' parts; all are not held twice."""
        size = self._counted.shape[1]
        return (h[first : first + size] for first in range(0, len(h), size))

    def _weighted(self, x: Iterable[jax.Array]) -> Iterator[tuple[jax.Array, jax.Array]]:
        return zip(x, self._counted, strict=True)

    def _attend(self, layer: DecoderLayer) -> Iterator[tuple[jax.Array, jax.Array]]:
        for x, batch in zip(self._x, self._text.batches, strict=True):
            yield _attend(layer, x, rotary_angles(jnp.asarray(batch.positions), self._config), batch.segments)

    def _fill(self, layer: DecoderLayer, index: int, stage: int) -> None:
        """Read a stage of a layer from the target."""
        leaves = [(path, leaf) for path, leaf in nnx.to_flat_state(nnx.state(layer)) if _stage(_dotted(path)) == stage]
        arrays = self._read([f"layers.{index}.{_dotted(path)}" for path, _ in leaves])
        filled = [
            (path, leaf.replace(jnp.asarray(array, leaf.get_value().dtype)))
            for (path, leaf), array in zip(leaves, arrays, strict=True)
        ]
        nnx.update(layer, nnx.from_flat_state(filled))

    def _read(self, paths: list[str]) -> list[np.ndarray]:
        arrays = Arrays(self._directory, paths)
        return [arrays.read(path) for path in paths]


class _ExpertTokens:
    """Which tokens each expert of a layer is calibrated on: those that chose it, by the weights that they give it.

    One that fewer tokens chose than it has inputs gets as many more, evenly from all others.
    """

    def __init__(self, experts: Experts, h: jax.Array, chosen: np.ndarray, weights: np.ndarray):
        """Take h [T, D], and what each token chose with which weights, [T, k]; the weights of padding are zero."""
        self._experts, self._h, self._chosen, self._weights = experts, h, chosen, weights

    def inputs(self, expert: int) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Yield the inputs of an expert and their weights."""
        yield from self._take(expert, self._h.shape[-1])

    def inner(self, expert: int) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Yield those of its second product."""
        gate_up = self._experts.gate_up.kernel
        for x, weights in self._take(expert, gate_up.shape[-2]):
            yield _inner_of(gate_up, x, expert), weights

    def _take(self, expert: int, least: int) -> Iterator[tuple[jax.Array, jax.Array]]:
        mine = np.where(self._chosen == expert, self._weights, 0).sum(axis=1)
        rows, others = np.flatnonzero(mine), np.flatnonzero((mine == 0) & self._weights.any(axis=1))
        weights = mine[rows]
        if (more := min(least - len(rows), len(others))) > 0:
            rows = np.concatenate([rows, others[np.arange(more) * len(others) // more]])
            weights = np.concatenate([weights, np.full(more, weights.mean() if len(weights) else 1)])
        for first in range(0, len(rows), _TOKENS):
            some = np.zeros(_TOKENS, np.int32), np.zeros(_TOKENS, np.float32)
            for padded, values in zip(some, (rows, weights), strict=True):
                padded[: len(rows) - first] = values[first : first + _TOKENS]
            yield self._h[some[0]], jnp.asarray(some[1])


def _stage(name: str) -> int:
    """Return the stage of a parameter, given its name within a layer; -1 is before all others, and needs no text."""
    module, _, part = name.rpartition(".")
    found = [stage for stage, names in enumerate(_STAGES) if module in names and part in ("weight", "scale")]
    return found[0] if found else -1


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


@jax.jit
def _norm(norm: RMSNorm, x: jax.Array) -> jax.Array:  # [T, D]
    return norm(x).reshape(-1, x.shape[-1])


@jax.jit
def _attend(layer: DecoderLayer, x: jax.Array, angles: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return x with what attention adds to it, and the inputs of its second product, [T, heads x head dim]."""
    inputs = []

    def attend(q, k, v, cache):
        inputs.append(packed_attention(q, k, v, segments))
        return inputs[0], cache

    out, _ = layer.attention(layer.input_norm(x), angles, attend, None)
    return x + out, inputs[0].reshape(out.size // out.shape[-1], -1)


@jax.jit
def _route(router: Router, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return router(x)[:2]


@jax.jit
def _inner(mlp: MLP, x: jax.Array) -> jax.Array:
    return swiglu(mlp.gate_up("td,xfd->txf", x), axis=1)


@jax.jit
def _inner_of(gate_up: Quantized, x: jax.Array, expert: jax.Array) -> jax.Array:
    return swiglu(einsum("td,xfd->txf", x, gate_up[expert]), axis=1)


@jax.jit
def _add(mlp: MLP | MoE, x: jax.Array, h: jax.Array) -> jax.Array:
    out = mlp(h)
    return x + (out[0] if isinstance(mlp, MoE) else out).reshape(x.shape)
