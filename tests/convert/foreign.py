"""Small foreign checkpoints, and what our parameters must be for them: written down without the converter's table."""

import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

BF16 = ml_dtypes.bfloat16

MOE = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 24,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "tie_word_embeddings": True,
}
DENSE = {
    "architectures": ["Ernie4_5_ForCausalLM"],
    "model_type": "ernie4_5",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # wider than hidden / heads
    "tie_word_embeddings": True,
}


class Model:
    """A random model: its tensors as Hugging Face names them, and the parameters they make."""

    def __init__(self, fields: dict, rng: np.random.Generator, mtp: int = 0, dtype=BF16, router=np.float32):
        self.fields = dict(fields)
        self.dtype, self.router, self.rng = dtype, router, rng
        self.tensors: dict[str, np.ndarray] = {}
        self.parameters: dict[str, np.ndarray] = {}
        self.width, self.vocab = fields["hidden_size"], fields["vocab_size"]
        self.heads, self.kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
        self.head_dim = fields.get("head_dim", self.width // self.heads)
        self.bias = fields.get("use_bias", False)
        moe = fields["model_type"] == "ernie4_5_moe"

        self.parameters["embed.weight"] = self.draw("model.embed_tokens.weight", self.vocab, self.width)
        for i in range(fields["num_hidden_layers"]):
            routed = moe and i >= fields.get("moe_layer_start_index", 1)
            self.layer(f"model.layers.{i}.", f"layers.{i}.", routed)
        self.parameters["norm.weight"] = self.draw("model.norm.weight", self.width)
        if not fields["tie_word_embeddings"]:
            self.parameters["head.weight"] = self.draw("lm_head.weight", self.vocab, self.width)
        if self.bias and moe:
            self.parameters["head.bias"] = self.draw("lm_head.bias", self.vocab)
        for d in range(mtp):
            self.layer(f"model.mtp_block.{d}.", f"mtp.{d}.layer.", False)
            for ours, theirs in (("embed_norm", "mtp_emb_norm"), ("hidden_norm", "mtp_hidden_norm")):
                self.parameters[f"mtp.{d}.{ours}.weight"] = self.draw(f"model.{theirs}.{d}.weight", self.width)
            projection = self.draw(f"model.mtp_linear_proj.{d}.weight", self.width, 2 * self.width)
            self.parameters[f"mtp.{d}.proj.weight"] = projection

    def draw(self, name: str, *shape: int, dtype=None) -> np.ndarray:
        self.tensors[name] = self.rng.standard_normal(shape).astype(dtype or self.dtype)
        return self.tensors[name]

    def linear(self, name: str, rows: int, columns: int, biased: bool = True):
        """Return weight and, if the model has biases, bias of a linear layer."""
        weight = self.draw(f"{name}.weight", rows, columns)
        return weight, self.draw(f"{name}.bias", rows) if self.bias and biased else None

    def put(self, name: str, weight: np.ndarray, bias: np.ndarray | None) -> None:
        self.parameters[f"{name}.weight"] = weight
        if bias is not None:
            self.parameters[f"{name}.bias"] = bias

    def layer(self, theirs: str, ours: str, routed: bool) -> None:
        for norm, name in (("input_norm", "input_layernorm"), ("post_attention_norm", "post_attention_layernorm")):
            self.parameters[f"{ours}{norm}.weight"] = self.draw(f"{theirs}{name}.weight", self.width)
        kv, per, size = self.kv_heads, self.heads // self.kv_heads, self.head_dim
        q, q_bias = self.linear(theirs + "self_attn.q_proj", self.heads * size, self.width)
        k, k_bias = self.linear(theirs + "self_attn.k_proj", kv * size, self.width)
        v, v_bias = self.linear(theirs + "self_attn.v_proj", kv * size, self.width)

        def fuse(q, k, v):  # for every key/value head its queries, then its key, then its value
            heads = [
                [*q.reshape(kv, per, size, -1)[g], k.reshape(kv, size, -1)[g], v.reshape(kv, size, -1)[g]]
                for g in range(kv)
            ]
            return np.array(heads)  # fmt: skip

        self.put(ours + "attention.qkv", fuse(q, k, v), fuse(q_bias, k_bias, v_bias)[..., 0] if self.bias else None)
        o, o_bias = self.linear(theirs + "self_attn.o_proj", self.width, self.heads * size)
        self.put(ours + "attention.out", o.reshape(self.width, kv, per, size), o_bias)
        if not routed:
            self.mlp(theirs + "mlp.", ours + "mlp.", self.fields["intermediate_size"])
            return
        experts, inner = self.fields["moe_num_experts"], self.fields["moe_intermediate_size"]
        router = self.draw(theirs + "mlp.gate.weight", experts, self.width, dtype=self.router)
        self.parameters[ours + "mlp.router.weight"] = router.astype(np.float32)
        name = theirs + "mlp.moe_statics.e_score_correction_bias"
        bias = self.draw(name, 1, experts, dtype=self.router)
        self.parameters[ours + "mlp.router.correction_bias"] = bias[0].astype(np.float32)
        gate_up, down = [], []
        for e in range(experts):
            expert = f"{theirs}mlp.experts.{e}."
            gate, up = (self.draw(f"{expert}{half}_proj.weight", inner, self.width) for half in ("gate", "up"))
            gate_up.append([gate, up])
            down.append(self.draw(f"{expert}down_proj.weight", self.width, inner))
        self.parameters[ours + "mlp.experts.gate_up.weight"] = np.array(gate_up)
        self.parameters[ours + "mlp.experts.down.weight"] = np.array(down)
        if shared := self.fields["moe_num_shared_experts"]:
            self.mlp(theirs + "mlp.shared_experts.", ours + "mlp.shared.", shared * inner)

    def mlp(self, theirs: str, ours: str, inner: int) -> None:
        gate, gate_bias = self.linear(theirs + "gate_proj", inner, self.width)
        up, up_bias = self.linear(theirs + "up_proj", inner, self.width)
        self.put(ours + "gate_up", np.stack([gate, up]), np.stack([gate_bias, up_bias]) if self.bias else None)
        self.put(ours + "down", *self.linear(theirs + "down_proj", self.width, inner))

    def save(self, directory: pathlib.Path, shards: int = 1, shuffled: bool = True) -> pathlib.Path:
        """Write the model as a Hugging Face directory."""
        write(directory, self.fields, self.tensors, shards, shuffled)
        return directory


def as_paddle(model: Model, grouped: bool) -> dict[str, np.ndarray]:
    """Rename, fuse and transpose a model's tensors as Paddle's frameworks do.

    Args:
      grouped: PaddleFormers' order of the fused attention (head by head) and its names; else the "-Paddle"
        repositories': all queries, all keys, all values.
    """
    source, result = dict(model.tensors), {}
    for name in list(source):
        if name not in source:
            continue
        if ".q_proj." in name:
            parts = [source.pop(name.replace(".q_proj.", f".{x}_proj.")) for x in "qkv"]
            if grouped:
                kv, size = model.kv_heads, model.head_dim
                heads = [p.reshape(kv, -1, size, *p.shape[1:]) for p in parts]
                fused = np.concatenate(heads, axis=1).reshape(-1, *parts[0].shape[1:])
            else:
                fused = np.concatenate(parts)
            result[name.replace(".q_proj.", ".qkv_proj.")] = fused.T
        elif ".gate_proj." in name:
            gate, up = source.pop(name), source.pop(name.replace(".gate_proj.", ".up_proj."))
            result[name.replace(".gate_proj.", ".up_gate_proj.")] = np.concatenate([gate, up]).T
        elif ".up_proj." in name or ".k_proj." in name or ".v_proj." in name:
            continue
        else:
            turned = name.endswith(("o_proj.weight", "down_proj.weight", "gate.weight")) or "linear_proj" in name
            result[name] = source.pop(name).T if turned else source.pop(name)
    if grouped:
        return {name: np.ascontiguousarray(x) for name, x in result.items()}
    return {name.replace("model.", "ernie."): np.ascontiguousarray(x) for name, x in result.items()}


def write(
    directory: pathlib.Path, fields: dict, tensors: dict[str, np.ndarray], shards: int = 1, shuffled: bool = True
) -> None:
    """Write config.json, a tokenizer file, and the tensors: dealt out to the shards like cards, or in their order."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(fields, indent=2))
    (directory / "tokenizer.model").write_bytes(b"not really a tokenizer")
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    size = -(-len(names) // shards)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        mine = names[i::shards] if shuffled else names[i * size : (i + 1) * size]
        save_file({name: tensors[name] for name in mine}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    write_index(directory, weight_map)


def write_index(directory: pathlib.Path, weight_map: dict[str, str]) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def read_tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Read all tensors of a Hugging Face directory through the reference implementation."""
    return {name: x for file in sorted(directory.glob("*.safetensors")) for name, x in load_file(file).items()}


def assert_same(found: dict, expected: dict) -> None:
    """Compare two flat trees: names, dtypes, shapes and every bit."""
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        ours = np.asarray(found[name])
        assert ours.dtype == value.dtype, name
        assert ours.shape == value.shape, name
        assert ours.tobytes() == value.tobytes(), name
