"""ModelConfig: the architecture of any text member of the ERNIE 4.5 family, read from a Hugging Face config.json.

The axis alphabet of the whole package, used in einsum strings and shape comments:

    B batch, T tokens, S cache length, D model width, N query heads, K key/value heads, R = N / K query heads
    per key/value head, H head dim, F inner width of an MLP or expert, E experts, V vocabulary, P pages
"""

from __future__ import annotations

import dataclasses
import json
import os

from etils import epath

from ernie_jax.errors import UserError

MODEL_TYPES = ("ernie4_5", "ernie4_5_moe")
QUANTIZED_FORMS = ("int8", "fp8", "int4")
# Paddle's config files name no model_type.
_ARCHITECTURES = {"Ernie4_5_ForCausalLM": "ernie4_5", "Ernie4_5_MoeForCausalLM": "ernie4_5_moe"}

# Fields that occur in published or re-saved config files and change nothing in the forward pass of a released model.
_IGNORED_FIELDS = frozenset(
    """
    _name_or_path _attn_implementation _attn_implementation_autoset architectures auto_map transformers_version
    torch_dtype dtype use_cache return_dict return_dict_in_generate output_attentions output_hidden_states
    output_router_logits output_scores id2label label2id num_labels problem_type chunk_size_feed_forward
    is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size decoder_start_token_id
    tie_encoder_decoder prefix pruned_heads sep_token_id cls_token_id mask_token_id bos_token tokenizer_class
    finetuning_task task_specific_params torchscript use_bfloat16 typical_p
    hidden_dropout_prob attention_probs_dropout_prob attention_dropout hidden_dropout moe_dropout_prob
    initializer_range init_std router_aux_loss_coef multi_token_pred_lambda multi_token_pred_depth ignored_index
    use_rmsnorm use_flash_attention use_flash_attn max_sequence_length use_moe moe_capacity moe_gate
    moe_use_aux_free moe_aux_loss_lambda moe_orthogonal_loss_lambda moe_z_loss_lambda moe_group moe_group_experts
    moe_group_orthogonal_loss moe_multimodal_dispatch_use_allgather moe_with_send_router_loss
    moe_reverse_token_drop moe_use_hard_gate moe_all_to_all_dropout moe_world_size moe_rank moe_gate_detach
    moe_use_aux_free_update_coef sinkhorn_2gate sinkhorn_temp weight_share_add_bias compression_ratio
    num_experts num_experts_per_tok use_recompute recompute_granularity tensor_parallel_output
    tensor_parallel_degree sequence_parallel context_parallel_degree sep_parallel_degree pp_seg_method
    paddleformers_version paddlenlp_version dpo_config kto_config remove_tail_layer
    token_balance_loss token_balance_seqlen disable_ffn_model_parallel disable_pipeline_warmup
    micro_batch_size use_sparse_head_and_loss_fn
    loss_subbatch_seqlen skip_recompute_ops embedding_dropout add_tail_layers global_aux_loss use_fast_ln model_name
""".split()  # noqa: SIM905
)
_IGNORED_PREFIXES = ("fuse_", "use_fused_", "use_sparse_", "pipeline_parallel", "virtual_pp", "fp8_", "use_fp8")

_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_REQUIRED_MOE = ("moe_num_experts", "moe_k", "moe_intermediate_size")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Describe one ERNIE 4.5 text model; field names are Hugging Face's.

    Attributes:
      quantize: "int8", "fp8" or "int4" where the weights of attention, MLPs and experts are stored so; None: all are
        floating-point. A checkpoint's manifest says it, not its config.json.
      quantize_embedding: whether token embedding and output head are then int8. The manifest says it too.

    Raises:
      UserError: if a combination of fields describes no valid model; the sentence names the field.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    tie_word_embeddings: bool = True
    use_bias: bool = False
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0
    moe_num_experts: int = 0
    moe_k: int = 0
    moe_intermediate_size: int = 0
    moe_num_shared_experts: int = 0
    moe_layer_start_index: int = 1
    moe_layer_end_index: int = -1
    moe_layer_interval: int = 1
    moe_norm_min: float = 1e-12
    num_nextn_predict_layers: int = 0
    quantize: str | None = None
    quantize_embedding: bool = False

    def __post_init__(self):
        if self.moe_layer_end_index == -1:
            object.__setattr__(self, "moe_layer_end_index", self.num_hidden_layers - 1)
        if self.quantize not in (None, *QUANTIZED_FORMS):
            raise UserError(f"--quantize={self.quantize}: unknown; choose {' or '.join(QUANTIZED_FORMS)}")
        if self.quantize_embedding and not self.quantize:
            raise UserError(f"--quantize_embedding goes with --quantize={' or '.join(QUANTIZED_FORMS)}; add it")
        for name in (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise UserError(f"config field {name} is {getattr(self, name)}: it must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"config field num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise UserError(f"config field head_dim is {self.head_dim}: rotary embedding needs an even number")
        if self.is_moe:
            for name in (*_REQUIRED_MOE, "moe_layer_interval"):
                if getattr(self, name) < 1:
                    raise UserError(f"config field {name} is {getattr(self, name)}: it must be at least 1")
            if self.moe_k > self.moe_num_experts:
                raise UserError(f"config field moe_k ({self.moe_k}) exceeds moe_num_experts ({self.moe_num_experts})")

    @property
    def is_moe(self) -> bool:
        return self.model_type == "ernie4_5_moe"

    @property
    def forms(self) -> str | None:
        """Say what the weights are rounded to."""
        return f"{self.quantize} (int8 embedding)" if self.quantize_embedding else self.quantize

    @property
    def queries_per_kv_head(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def moe_shared_intermediate_size(self) -> int:
        """Inner width of the shared experts, which are one MLP; 0 without them."""
        return self.moe_intermediate_size * self.moe_num_shared_experts

    @property
    def head_bias(self) -> bool:
        """Whether the output head has a bias: in transformers `use_bias` gives the MoE models one, the dense none."""
        return self.use_bias and self.is_moe

    def is_moe_layer(self, index: int) -> bool:
        """Tell whether decoder layer `index` routes tokens to experts."""
        return (
            self.is_moe
            and (index + 1) % self.moe_layer_interval == 0
            and self.moe_layer_start_index <= index <= self.moe_layer_end_index
        )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The decoder layers that route tokens to experts."""
        return tuple(filter(self.is_moe_layer, range(self.num_hidden_layers)))

    @classmethod
    def from_hf(cls, fields: dict, source: str = "config.json") -> ModelConfig:
        """Build a ModelConfig from the fields of a Hugging Face config.json.

        Args:
          fields: the parsed JSON object.
          source: the file's name, for error sentences.

        Raises:
          UserError: on another model's config, a missing or unknown field, or a setting that no ERNIE 4.5 text
            model has.
        """
        fields = dict(fields)
        architectures = fields.get("architectures") or [None]
        model_type = fields.pop("model_type", None) or _ARCHITECTURES.get(architectures[0])
        if model_type in ("ernie4_5_moe_vl", "ernie4_5_vl_moe"):
            raise UserError(f"{source}: model_type {model_type!r} is a vision model; only text models are supported")
        if model_type not in MODEL_TYPES:
            raise UserError(
                f"{source}: model_type is {model_type!r}, not an ERNIE 4.5 text model ({' or '.join(MODEL_TYPES)})"
            )
        moe = model_type == "ernie4_5_moe"
        missing = [n for n in _REQUIRED + (_REQUIRED_MOE if moe else ()) if fields.get(n) is None]
        if missing:
            raise UserError(f"{source}: missing field{'s' * (len(missing) > 1)} {', '.join(missing)}")

        values = {"model_type": model_type, "rope_theta": _rope_theta(fields, source)}
        # A non-default activation or router would change the forward pass; no released model has one.
        for name, only in (("hidden_act", "silu"), ("moe_gate_act", "softmax")):
            if (found := fields.pop(name, None) or only) != only:
                raise UserError(f"{source}: {name} is {found!r}; only {only!r} is supported")
        known = {f.name: f.type for f in dataclasses.fields(cls) if not f.name.startswith("quantize")}
        unknown = []
        for name, value in fields.items():
            if name in known:
                if value is not None:
                    values[name] = _typed(name, value, known[name], source)
            elif name not in _IGNORED_FIELDS and not name.startswith(_IGNORED_PREFIXES) and value:
                unknown.append(name)
        if unknown:
            raise UserError(
                f"{source}: unknown field{'s' * (len(unknown) > 1)} {', '.join(sorted(unknown))}; "
                "if the model works without, delete from the file"
            )
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
        if not moe:
            values = {n: v for n, v in values.items() if not n.startswith("moe_")}
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> ModelConfig:
        """Read a Hugging Face config.json; local paths and gs:// alike."""
        return cls.from_hf(read_json(path), str(path))


def read_json(path: str | os.PathLike) -> dict:
    """Parse the JSON object in a file; local paths and gs:// alike.

    Raises:
      UserError: if the file is missing, is not JSON, or holds something other than an object.
    """
    path = epath.Path(path)
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _rope_theta(fields: dict, source: str) -> float:
    """Take rope_theta from the top level or from rope_parameters, refusing context scaling."""
    theta = fields.pop("rope_theta", None)
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.pop(name, None) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"{source}: {name} asks for {kind!r} scaling; ERNIE 4.5 uses plain rotary embedding")
        theta = rope.get("rope_theta", theta)
    return float(500000.0 if theta is None else theta)


def _typed(name: str, value, kind: str, source: str):
    """Return a config value as the field's type; `kind` is the dataclass annotation."""
    if name == "eos_token_id" and isinstance(value, list):
        value = value[0]  # all of them stop generation: generation_config.json lists them
    good = {"int": int, "float": (int, float), "bool": bool, "str": str}[kind]
    if not isinstance(value, good) or (kind != "bool" and isinstance(value, bool)):
        raise UserError(f"{source}: field {name} must be {kind}, found {value!r}")
    return float(value) if kind == "float" else value
