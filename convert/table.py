"""The table of names: which tensor of a foreign checkpoint fills which part of which parameter.

A row is (tensor, its axes, parameter, the blocks of the parameter that its rows fill in order). The letters of an axis
multiply; they are the alphabet of ernie_jax.config and: M and W, the inner widths of a routed and of the shared
experts; G = R + 2; U = 2. A block is a numpy index. Our parameters keep Hugging Face's [out, in] orientation, so that
a tensor is copied as it stands.

Three layouts are read:
  hf              Hugging Face's. Source: `transformers` conversion_mapping.py and a saved model.
  paddle          the "-Paddle" repositories: "ernie." names, linear weights [in, out], gate and up fused, and all
                  queries, all keys, all values fused. Source: the paddle2torch tool of PaddlePaddle/ERNIE and
                  FastDeploy's `gqa_qkv_split_func`.
  paddleformers   the same with "model." names and, one key/value head after the other, its queries, key and value
                  fused. Source: PaddleFormers' `_gen_aoa_config`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from convert.shards import StoredTensor
from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.model import parameter_specs

_ALL = ()
_GATE, _UP = (0,), (1,)
_QUERIES, _KEYS, _VALUES = np.s_[:, :-2], np.s_[:, -2], np.s_[:, -1]

# Linear layers of a decoder layer: ".weight" with both axes and, where the parameter exists, ".bias" with the first.
_OUT_PROJECTIONS = (
    ("self_attn.o_proj", "D KRH", "attention.out", [_ALL]),
    ("mlp.down_proj", "D F", "mlp.down", [_ALL]),
    ("mlp.gate", "E D", "mlp.router", [_ALL]),
    ("mlp.experts.{e}.down_proj", "D M", "mlp.experts.down", [_ALL]),
    ("mlp.shared_experts.down_proj", "D W", "mlp.shared.down", [_ALL]),
)
_HF_LINEARS = (
    *_OUT_PROJECTIONS,
    ("self_attn.q_proj", "KRH D", "attention.qkv", [_QUERIES]),
    ("self_attn.k_proj", "KH D", "attention.qkv", [_KEYS]),
    ("self_attn.v_proj", "KH D", "attention.qkv", [_VALUES]),
    ("mlp.gate_proj", "F D", "mlp.gate_up", [_GATE]),
    ("mlp.up_proj", "F D", "mlp.gate_up", [_UP]),
    ("mlp.experts.{e}.gate_proj", "M D", "mlp.experts.gate_up", [_GATE]),
    ("mlp.experts.{e}.up_proj", "M D", "mlp.experts.gate_up", [_UP]),
    ("mlp.shared_experts.gate_proj", "W D", "mlp.shared.gate_up", [_GATE]),
    ("mlp.shared_experts.up_proj", "W D", "mlp.shared.gate_up", [_UP]),
)
_FUSED_LINEARS = (
    *_OUT_PROJECTIONS,
    ("mlp.up_gate_proj", "UF D", "mlp.gate_up", [_ALL]),
    ("mlp.experts.{e}.up_gate_proj", "UM D", "mlp.experts.gate_up", [_ALL]),
    ("mlp.shared_experts.up_gate_proj", "UW D", "mlp.shared.gate_up", [_ALL]),
)
_PADDLE_LINEARS = (*_FUSED_LINEARS, ("self_attn.qkv_proj", "KGH D", "attention.qkv", [_QUERIES, _KEYS, _VALUES]))
_PADDLEFORMERS_LINEARS = (*_FUSED_LINEARS, ("self_attn.qkv_proj", "KGH D", "attention.qkv", [_ALL]))

_LAYER_TENSORS = (
    ("input_layernorm.weight", "D", "input_norm.weight"),
    ("post_attention_layernorm.weight", "D", "post_attention_norm.weight"),
    ("mlp.moe_statics.e_score_correction_bias", "1 E", "mlp.router.correction_bias"),
)
_TOP_TENSORS = (
    ("{prefix}embed_tokens.weight", "V D", "embed.weight"),
    ("{prefix}norm.weight", "D", "norm.weight"),
    ("lm_head.bias", "V", "head.bias"),
)
_MTP_TENSORS = (
    ("{prefix}mtp_emb_norm.{d}.weight", "D", "mtp.{d}.embed_norm.weight"),
    ("{prefix}mtp_hidden_norm.{d}.weight", "D", "mtp.{d}.hidden_norm.weight"),
)
# Published files hold these in either orientation, whatever their layout: the shape tells.
_HEAD = ("lm_head.weight", "V D", "head.weight")
_MTP_PROJECTION = ("{prefix}mtp_linear_proj.{d}.weight", "D UD", "mtp.{d}.proj.weight")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one family of foreign checkpoints names, fuses and orients its tensors."""

    name: str
    prefix: str
    linears: tuple
    transposed: bool  # linear weights are [in, out]
    dtypes: tuple[str, ...]


_FLOATS = ("BF16", "F16", "F32")
_HF = Layout("hf", "model.", _HF_LINEARS, False, _FLOATS)
_PADDLE = Layout("paddle", "ernie.", _PADDLE_LINEARS, True, (*_FLOATS, "U16"))
_PADDLEFORMERS = Layout("paddleformers", "model.", _PADDLEFORMERS_LINEARS, True, (*_FLOATS, "U16"))


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor that a checkpoint must have.

    Attributes:
      blocks: the parts of the parameter that the rows of the tensor fill, in order: tuples of ints and slices, no
        number negative, restricting the leading axes.
      shapes: its possible shapes on disk, each with whether the tensor is then the transpose of [rows, columns].
    """

    name: str
    parameter: str
    blocks: tuple[tuple, ...]
    shapes: dict[tuple[int, ...], bool]


@dataclasses.dataclass(frozen=True)
class Placement:
    """A tensor of a source and its place in a parameter; see Rule."""

    tensor: StoredTensor
    parameter: str
    blocks: tuple[tuple, ...]
    transposed: bool


def find_layout(names: Iterable[str]) -> Layout:
    """Tell the layout of a checkpoint by its tensor names."""
    names = list(names)
    if any(name.startswith(_PADDLE.prefix) for name in names):
        return _PADDLE
    return _PADDLEFORMERS if any(name.endswith(".qkv_proj.weight") for name in names) else _HF


def count_mtp_layers(names: Iterable[str]) -> int:
    """Count the multi-token-prediction layers of which a checkpoint has any tensor."""
    depths = [int(match[1]) for name in names if (match := re.match(r"\w+\.mtp_\w+\.(\d+)\.", name))]
    return max(depths, default=-1) + 1


def expand(config: ModelConfig, layout: Layout = _HF) -> dict[str, Rule]:
    """List the tensors that a checkpoint of `config` must have, by name, in the order of our parameters."""
    shapes = {path: spec.shape for path, spec in parameter_specs(config).items()}
    sizes = _axis_sizes(config)
    rules = []
    for name, axes, parameter, blocks, orientations in _rows(config, layout):
        if parameter in shapes:  # of the dense and the MoE rows of a layer, and of the biases, those that the model has
            shape = tuple(math.prod(sizes[letter] for letter in axis) for axis in axes.split())
            on_disk = {shape[::-1] if transposed else shape: transposed for transposed in orientations}
            rules.append(Rule(name, parameter, tuple(_resolve(b, shapes[parameter]) for b in blocks), on_disk))
    order = {path: position for position, path in enumerate(shapes)}
    return {rule.name: rule for rule in sorted(rules, key=lambda rule: order[rule.parameter])}


def place(
    config: ModelConfig, tensors: Mapping[str, StoredTensor], where: str, hint: str = ""
) -> tuple[list[Placement], list[str]]:
    """Find the place of every tensor of a checkpoint.

    Args:
      where: the checkpoint's name, for the error sentence; `hint` is put at its end.

    Returns:
      The placements, and the names of the tensors rightly ignored: the stray head of a tied model.

    Raises:
      UserError: naming all missing, unexpected, wrongly shaped and wrongly typed tensors.
    """
    layout = find_layout(tensors)
    rules = expand(config, layout)
    ignored = [name for name in (_HEAD[0],) if name in tensors and name not in rules]
    present = [rule for rule in rules.values() if rule.name in tensors]
    problems = {
        "missing": [name for name in rules if name not in tensors],
        "unexpected": [name for name in tensors if name not in rules and name not in ignored],
        "wrong shape": [
            f"{rule.name} is {list(tensors[rule.name].shape)}, expected {_alternatives(map(list, rule.shapes))}"
            for rule in present
            if tensors[rule.name].shape not in rule.shapes
        ],
        "wrong dtype": [
            f"{rule.name} is {tensors[rule.name].dtype}, expected {_alternatives(layout.dtypes)}"
            for rule in present
            if tensors[rule.name].dtype not in layout.dtypes
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_listing(items)}" for kind, items in problems.items() if items)
        raise UserError(f"{where}: the tensors do not fit config.json: {listed}{hint}")
    placements = [
        Placement(tensors[rule.name], rule.parameter, rule.blocks, rule.shapes[tensors[rule.name].shape])
        for rule in present
    ]
    return placements, ignored


def parameter_dtypes(
    config: ModelConfig, placements: Iterable[Placement], requested: np.dtype | None
) -> dict[str, np.dtype]:
    """Choose the dtype in which each parameter is stored.

    Router tensors stay float32, and quantised ones and their scales are as the form says. All others take the requested
    dtype or, without one, keep their own; where the tensors of one fused parameter differ, it is float32, which holds
    them all.
    """
    found: dict[str, set[np.dtype]] = {}
    for placement in placements:
        found.setdefault(placement.parameter, set()).add(placement.tensor.numpy_dtype)
    specs = parameter_specs(config)

    def choose(path: str, dtypes: set[np.dtype]) -> np.dtype:
        dtype = specs[path].dtype
        if dtype != jnp.bfloat16 or path.endswith(".scale"):  # the specs ask for bfloat16 wherever they may
            return dtype
        if requested is not None:
            return requested
        return next(iter(dtypes)) if len(dtypes) == 1 else np.dtype(np.float32)

    return {path: choose(path, found.get(path, set())) for path in specs}


def scale_path(weight: str) -> str:
    """Name the scales of a quantised parameter."""
    return f"{weight.removesuffix('weight')}scale"


def is_lossless(source: np.dtype, stored: np.dtype) -> bool:
    """Tell whether every value of one float dtype survives being stored in another."""
    return source == stored or stored == np.float32


def _rows(config: ModelConfig, layout: Layout) -> Iterator[tuple[str, str, str, list, tuple[bool, ...]]]:
    """Yield (tensor, axes, parameter, blocks, orientations) for every layer, expert and depth."""
    depths = range(config.num_nextn_predict_layers)
    layers = [(f"layers.{i}.", f"layers.{i}.") for i in range(config.num_hidden_layers)]
    layers += [(f"mtp_block.{d}.", f"mtp.{d}.layer.") for d in depths]
    for source, target in layers:
        for tensor, axes, parameter in _LAYER_TENSORS:
            yield layout.prefix + source + tensor, axes, target + parameter, [_ALL], (False,)
        for tensor, axes, parameter, blocks in layout.linears:
            experts = range(config.moe_num_experts) if "{e}" in tensor else [None]
            for e in experts:
                own = blocks if e is None else [(e, *block) for block in blocks]
                name = layout.prefix + source + tensor.format(e=e)
                yield f"{name}.weight", axes, f"{target}{parameter}.weight", own, (layout.transposed,)
                yield f"{name}.bias", axes.split()[0], f"{target}{parameter}.bias", own, (False,)
    for tensor, axes, parameter in _TOP_TENSORS:
        yield tensor.format(prefix=layout.prefix), axes, parameter, [_ALL], (False,)
    yield *_HEAD, [_ALL], (True, False)
    for d in depths:
        for tensor, axes, parameter in _MTP_TENSORS:
            yield tensor.format(prefix=layout.prefix, d=d), axes, parameter.format(d=d), [_ALL], (False,)
        tensor, axes, parameter = _MTP_PROJECTION
        yield tensor.format(prefix=layout.prefix, d=d), axes, parameter.format(d=d), [_ALL], (True, False)


def _axis_sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "1": 1,
        "D": config.hidden_size,
        "E": config.moe_num_experts,
        "F": config.intermediate_size,
        "G": config.queries_per_kv_head + 2,
        "H": config.head_dim,
        "K": config.num_key_value_heads,
        "M": config.moe_intermediate_size,
        "R": config.queries_per_kv_head,
        "U": 2,
        "V": config.vocab_size,
        "W": config.moe_shared_intermediate_size,
    }


def _resolve(block: tuple, shape: tuple[int, ...]) -> tuple:
    """Write an index without negative numbers and open ends."""
    return tuple(
        slice(*entry.indices(size)) if isinstance(entry, slice) else range(size)[entry]
        for entry, size in zip(block, shape, strict=False)
    )


def _alternatives(items: Iterable) -> str:
    return " or ".join(map(str, items))


def _listing(items: list[str], most: int = 100) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
