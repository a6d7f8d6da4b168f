"""Write small random ERNIE 4.5 checkpoints with `transformers`, and what `transformers` computes from them.

    python tests/parity/write_fixtures.py --out=DIR --seed=N [--full_width]
    python tests/parity/write_fixtures.py --gradients=DIR
    python tests/parity/write_fixtures.py --load=HF_DIR

The only file of this project that imports torch. `expected.npz` of a case holds, for each prompt i,

    tokens_{i} [length + steps]   the prompt and its greedy continuation; length_{i}
    logits_{i} [length + steps - 1, V] float32, of a prefill and one cached step a token
    experts_{i} [MoE layers, length + steps - 1, k], best score first

and for the prompt number `detailed`, over its tokens alone (names of states: see `Recorder`)

    float32.{state}     what the float32 model computes
    bfloat16.{state}    what the bfloat16 model computes, as the bits in uint16; its "logits" too
    exact.{state}       the same half layer in float32, from the bfloat16 model's own input to it; "logits" too
    routing_weights_float32, routing_weights_bfloat16   [MoE layers, length, k] float32
    experts_bfloat16    [MoE layers, length, k]

and over all prompts the median distance of the bfloat16 model from the float32 model: bfloat16_logit_error of the
logits, bfloat16_logprob_error of the log-probabilities of the tokens that came next. (The mean would hang on the few
tokens to which rounding gives another expert.) inverse_frequencies [H/2] are those of the rotary embedding.
A case with gradients has beside its checkpoint another one, "gradients", in float32 and of the same names: those of the
mean cross-entropy of the next token over all sequences. --gradients writes these anew, of checkpoints that are there.
`summary.json` in DIR counts the prompts drawn, those redrawn by reason, and the routing decisions of those kept.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import json
import pathlib
import zlib

import numpy as np
import torch
import transformers
from transformers import DynamicCache, Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, Ernie4_5Config, Ernie4_5ForCausalLM
from transformers.initialization import no_init_weights

DETAILED = 2  # the prompt whose states are kept layer by layer
MAX_DRAWS = 500  # of a prompt
ROUNDING_STEPS = 2  # of float32, by which two biased scores may move towards each other in another program


@dataclasses.dataclass(frozen=True)
class Case:
    """One checkpoint.

    Attributes:
      config: fields of its config.json.
      stored: dtype on disk; routers are float32 always.
      lengths: of the prompts.
      steps: tokens of a greedy continuation.
      logit_lead, router_lead: a smaller lead of the best token, or of the last chosen expert, is a tie.
      min_distinct: tokens in a continuation; one that repeats itself tests little.
      shard: size of the safetensors files.
      gradients: whether to write those.
    """

    config: dict
    stored: torch.dtype = torch.bfloat16
    lengths: tuple[int, ...] = (1, 5, 16, 37)  # on and off the borders of pages and prefill chunks
    steps: int = 64
    logit_lead: float = 2e-4  # twice the float32 tolerance
    router_lead: float = 0.0  # beyond ROUNDING_STEPS, which never count
    min_distinct: int = 6
    shard: str = "64KB"
    gradients: bool = False


def _dense(heads, kv_heads, head_dim, **fields) -> dict:
    """Shape a dense model; as in the 0.3B, the heads are wider together than the hidden state."""
    heads = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    return _SIZES | {"num_hidden_layers": 3} | heads | fields


def _moe(layers, heads, kv_heads, experts, k, shared, **fields) -> dict:
    heads = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "moe_intermediate_size": 16}
    moe = {"moe_num_experts": experts, "moe_k": k, "moe_num_shared_experts": shared}
    return _SIZES | {"num_hidden_layers": layers} | heads | moe | fields


_SIZES = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 128, "max_position_embeddings": 256}
_UNTIED = {"tie_word_embeddings": False}

SMALL = {
    "dense": Case(_dense(6, 3, 16), stored=torch.float32),
    "dense_bias_untied": Case(_dense(5, 1, 8, use_bias=True, **_UNTIED), gradients=True),
    "moe_ratio1": Case(_moe(3, 4, 4, 8, 2, 1), stored=torch.float32),
    "moe_interval2": Case(_moe(4, 4, 2, 8, 3, 2, moe_layer_start_index=0, moe_layer_interval=2), gradients=True),
    "moe_range": Case(_moe(4, 5, 1, 8, 2, 1, hidden_size=40, moe_layer_start_index=1, moe_layer_end_index=2)),
    "moe_bias_tied": Case(_moe(3, 4, 2, 8, 2, 2, use_bias=True)),
    "moe_bias_untied_norm_min": Case(
        _moe(2, 4, 2, 8, 2, 1, use_bias=True, moe_norm_min=0.6, **_UNTIED), gradients=True
    ),
    "like_21b": Case(_moe(3, 20, 4, 32, 6, 2, hidden_size=80, intermediate_size=96, moe_intermediate_size=8)),
    "like_300b": Case(_moe(5, 8, 1, 64, 8, 0, moe_intermediate_size=8, moe_layer_start_index=3, **_UNTIED)),
}
# The released models' widths in two layers. Here tokens must be equal in bfloat16, too, which moves logits by
# hundredths and router scores by ten-thousandths: leads are wider, and tokens few, so that some prompt has such leads.
_WIDE = {"lengths": (4,), "steps": 4, "logit_lead": 0.2, "router_lead": 1e-3, "min_distinct": 1}
FULL_WIDTH = {
    "full_width_0.3b": Case({"num_hidden_layers": 2}, shard="200MB", **_WIDE),
    "full_width_21b": Case({"num_hidden_layers": 2, "moe_num_experts": 64}, shard="600MB", **_WIDE),
}


def is_moe(case: Case) -> bool:
    """Tell whether a case is of the MoE class; the dense one has no such field."""
    return "moe_num_experts" in case.config


def build(case: Case, generator: torch.Generator):
    """Make a case's model in its stored dtype, with weights on which a wrong program cannot pass by luck.

    transformers' initialisation gives flat routers and flat logits. Here every branch of the residual stream counts,
    router logits deviate by 1.5, no bias is zero, no norm weight one, and the correction biases are like the released
    models': 20 to 63, nearly equal within a layer, with a spread of 0.005 to 0.03.
    """
    moe = is_moe(case)
    config = (Ernie4_5_MoeConfig if moe else Ernie4_5Config)(**case.config, dtype=case.stored)
    with no_init_weights():
        model = (Ernie4_5_MoeForCausalLM if moe else Ernie4_5ForCausalLM)(config)
    model.tie_weights()  # part of the initialisation that was skipped

    def normal(shape, scale):
        return torch.randn(shape, generator=generator) * scale

    for name, p in model.named_parameters():
        router = name.endswith(("mlp.gate.weight", "e_score_correction_bias"))
        if name.endswith("e_score_correction_bias"):
            base, spread = torch.rand(2, generator=generator).tolist()
            value = 20 + 43 * base + normal(p.shape, 0.005 + 0.025 * spread)
        elif "norm" in name:
            value = 1 + normal(p.shape, 0.2)
        elif name.endswith("bias"):
            value = normal(p.shape, 0.3)
        elif name.endswith("embed_tokens.weight"):
            value = normal(p.shape, 2.3 * p.shape[-1] ** -0.5)  # the deviation of a tied model's logits
        else:
            value = normal(p.shape, (1.5 if router else 1.3) * p.shape[-1] ** -0.5)
        p.data = value.to(torch.float32 if router else case.stored)
    return model


def load(directory: pathlib.Path, dtype: torch.dtype | str):
    """Read a checkpoint as a user of transformers would; from_pretrained keeps the router float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


class Recorder:
    """Collect hidden states and routing while a model runs.

    States are "embed", then "layer_{i}.attention" (the residual stream after layer i's attention) and "layer_{i}"
    (after the layer), then "norm" (after the final norm).
    """

    def __init__(self, model):
        self.handles = []
        self.states = collections.defaultdict(list)
        self.routing = collections.defaultdict(list)  # MoE layer -> what `routed` stacks, of each call
        inner = model.model
        self._keep_output(inner.embed_tokens, "embed")
        for i, layer in enumerate(inner.layers):
            hook = layer.post_attention_layernorm.register_forward_pre_hook(
                lambda module, args, name=f"layer_{i}.attention": self.states[name].append(args[0][0])
            )
            self.handles.append(hook)
            self._keep_output(layer, f"layer_{i}")
            if hasattr(layer.mlp, "gate"):
                self.handles.append(layer.mlp.gate.register_forward_hook(self._router_hook(i)))
        self._keep_output(inner.norm, "norm")

    def _keep_output(self, module, name):
        hook = module.register_forward_hook(lambda module, args, output: self.states[name].append(output[0]))
        self.handles.append(hook)

    def _router_hook(self, layer):
        def hook(gate, args, output):
            logits, weights, experts = output
            probabilities = torch.softmax(logits, dim=1, dtype=torch.float)
            unbiased = torch.topk(probabilities, gate.top_k).indices
            scores = gate.moe_statics(probabilities)  # as the gate itself adds the bias
            self.routing[layer].append({"scores": scores, "experts": experts, "weights": weights, "unbiased": unbiased})

        return hook

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def state(self, name) -> torch.Tensor:  # [T, D]
        return torch.cat(self.states[name])

    def routed(self, what: str) -> np.ndarray:
        """Stack the biased scores, experts, weights, or the unbiased choice of experts: [MoE layers, T, ...]."""
        layers = [torch.cat([call[what] for call in calls]).float().numpy() for calls in self.routing.values()]
        return np.stack(layers) if layers else np.zeros((0, 1, 1), np.float32)


def has_tie(scores: np.ndarray, k: int, lead: float = 0.0) -> bool:
    """Tell whether the k-th and the next best score of any token are within ROUNDING_STEPS, or `lead`."""
    best = -np.sort(-scores, axis=-1)
    last, first_left_out = best[..., k - 1], best[..., k]
    return bool(np.any(last - first_left_out <= np.maximum(ROUNDING_STEPS * np.spacing(last), lead)))


def greedy(model, prompt: list[int], steps: int) -> tuple[list[int], torch.Tensor]:
    """Continue a prompt through the cache; return all tokens and the logits [length + steps - 1, V]."""
    cache = DynamicCache(config=model.config)
    tokens, logits, new = list(prompt), [], prompt
    for _ in range(steps):
        logits.append(model(torch.tensor([new]), past_key_values=cache, use_cache=True).logits[0])
        tokens.append(int(logits[-1][-1].argmax()))
        new = tokens[-1:]
    return tokens, torch.cat(logits)


def weakness(case: Case, model, tokens, logits, cached: Recorder) -> str | None:
    """Name the reason why two correct programs may disagree on a prompt, or why it would test little."""
    k = getattr(model.config, "moe_k", 0)
    if k and has_tie(cached.routed("scores"), k, case.router_lead):
        return "router_tie"
    best = torch.topk(logits[-case.steps :], 2).values
    if (best[:, 0] - best[:, 1]).min() < case.logit_lead:
        return "logit_tie"
    if len(set(tokens[-case.steps :])) < case.min_distinct:
        return "repetitive"
    with Recorder(model) as whole:
        model(torch.tensor([tokens[:-1]]))
    # transformers with a cache and without: these, too, are two correct programs.
    same = np.array_equal(np.sort(whole.routed("experts")), np.sort(cached.routed("experts")))
    return None if same else "experts_differ_without_cache"


def draw_sequence(case: Case, model, length: int, generator, counts: collections.Counter):
    """Draw prompts until one is a fair test; return its tokens, logits and Recorder."""
    for _ in range(MAX_DRAWS):
        prompt = torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()
        counts["drawn"] += 1
        with Recorder(model) as cached:
            tokens, logits = greedy(model, prompt, case.steps)
        reason = weakness(case, model, tokens, logits, cached)
        if reason is None:
            return tokens, logits, cached
        counts[reason] += 1
    raise SystemExit(f"no prompt of {length} tokens was accepted in {MAX_DRAWS} draws: {dict(counts)}")


def half_layers_in_float32(exact, states: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Compute every state from the one before it in float32, without the roundings in between.

    Args:
      exact: the bfloat16 model's weights in a float32 model.
      states: what the bfloat16 model computed, by name.

    Returns:
      (states, "logits" too, experts [MoE layers, T, k]).
    """
    inner, x = exact.model, states["embed"].float()[None]
    angles = inner.rotary_emb(x, torch.arange(x.shape[1])[None])
    out = {"embed": x[0]}
    with Recorder(exact) as recorder:
        for i, layer in enumerate(inner.layers):
            attended, _ = layer.self_attn(layer.input_layernorm(x), position_embeddings=angles, attention_mask=None)
            out[f"layer_{i}.attention"] = (x + attended)[0]
            x = states[f"layer_{i}.attention"].float()[None]
            out[f"layer_{i}"] = (x + layer.mlp(layer.post_attention_layernorm(x)))[0]
            x = states[f"layer_{i}"].float()[None]
        out["norm"] = inner.norm(x)[0]
    out["logits"] = exact.lm_head(states["norm"].float())
    return out, recorder.routed("experts")


def expectations(case: Case, checkpoint: pathlib.Path, generator) -> tuple[dict[str, np.ndarray], dict]:
    """Compute everything that `expected.npz` holds, and the counts of what was drawn and redrawn."""
    counts = collections.Counter()
    model, rounded = load(checkpoint, torch.float32), load(checkpoint, torch.bfloat16)
    exact = model if case.stored == torch.bfloat16 else copy.deepcopy(rounded).float()
    which = min(DETAILED, len(case.lengths) - 1)
    arrays = {"detailed": np.array(which), "inverse_frequencies": model.model.rotary_emb.inv_freq.numpy()}
    logit_errors, logprob_errors = [], []
    for i, length in enumerate(case.lengths):
        states = None
        while states is None:
            tokens, logits, cached = draw_sequence(case, model, length, generator, counts)
            states = detailed(model, rounded, exact, tokens[:length], counts) if i == which else {}
        arrays |= states
        rounded_logits = rounded(torch.tensor([tokens[:-1]])).logits[0].float()
        logit_errors.append((rounded_logits - logits).flatten())
        gap = torch.log_softmax(rounded_logits, -1) - torch.log_softmax(logits, -1)
        logprob_errors.append(gap[torch.arange(len(gap)), torch.tensor(tokens[1:])])
        arrays[f"length_{i}"] = np.array(length)
        arrays[f"tokens_{i}"] = np.array(tokens, np.int32)
        arrays[f"logits_{i}"] = logits.numpy()
        arrays[f"experts_{i}"] = cached.routed("experts").astype(np.uint8)
        if is_moe(case):
            choices = [np.sort(cached.routed(what)) for what in ("experts", "unbiased")]
            counts["routing_decisions"] += choices[0][..., 0].size
            counts["routing_decided_by_bias"] += int(np.any(choices[0] != choices[1], axis=-1).sum())
    arrays["bfloat16_logit_error"] = torch.cat(logit_errors).abs().median().numpy()
    arrays["bfloat16_logprob_error"] = torch.cat(logprob_errors).abs().median().numpy()
    return arrays, dict(counts)


def detailed(model, rounded, exact, prompt: list[int], counts) -> dict[str, np.ndarray] | None:
    """Compute the states of one prompt, layer by layer, in float32 and in bfloat16.

    Returns None where two experts are so close that the bfloat16 model's own rounding, or the next program's, decides.
    """
    with Recorder(model) as wide:
        model(torch.tensor([prompt]))
    with Recorder(rounded) as narrow:
        logits = rounded(torch.tensor([prompt])).logits[0]
    states = {name: narrow.state(name) for name in narrow.states} | {"logits": logits}
    exact_states, exact_experts = half_layers_in_float32(exact, states)
    if narrow.routing and has_tie(narrow.routed("scores"), model.config.moe_k):
        counts["router_tie_in_bfloat16"] += 1
        return None
    if not np.array_equal(np.sort(exact_experts), np.sort(narrow.routed("experts"))):
        counts["experts_differ_in_bfloat16"] += 1
        return None
    arrays = {f"float32.{name}": wide.state(name).numpy() for name in wide.states}
    arrays |= {f"bfloat16.{name}": value.view(torch.uint16).numpy() for name, value in states.items()}
    arrays |= {f"exact.{name}": value.numpy() for name, value in exact_states.items()}
    arrays |= {"routing_weights_float32": wide.routed("weights"), "routing_weights_bfloat16": narrow.routed("weights")}
    return arrays | {"experts_bfloat16": narrow.routed("experts").astype(np.uint8)}


def write_gradients(case: Case, folder: pathlib.Path) -> None:
    """Write the gradients of a case whose checkpoint and sequences are in a folder."""
    model = load(folder / "checkpoint", torch.float32)
    model.get_input_embeddings().padding_idx = None  # token 0 is one like others here, and has its gradient
    with np.load(folder / "expected.npz") as arrays:
        sequences = [torch.tensor(arrays[f"tokens_{i}"], dtype=torch.int64) for i in range(len(case.lengths))]
    with torch.enable_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                model(tokens[None, :-1], use_cache=False).logits[0], tokens[1:], reduction="sum"
            )
            for tokens in sequences
        ]
        (sum(losses) / sum(len(tokens) - 1 for tokens in sequences)).backward()
    for p in model.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad  # a correction bias has none
    model.save_pretrained(folder / "gradients")


def write_case(name: str, case: Case, seed: int, out: pathlib.Path) -> dict:
    """Write one case; return what was counted."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    checkpoint = out / name / "checkpoint"
    checkpoint.mkdir(parents=True)
    build(case, generator).save_pretrained(checkpoint, max_shard_size=case.shard)
    arrays, counts = expectations(case, checkpoint, generator)
    np.savez_compressed(out / name / "expected.npz", **arrays)
    if case.gradients:
        write_gradients(case, out / name)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="folder to write, which must not exist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full_width", action="store_true", help="write the released models' widths, too: 3 GB")
    parser.add_argument("--gradients", type=pathlib.Path, help="write only gradients, into this folder of cases")
    parser.add_argument("--load", type=pathlib.Path, help="only load this checkpoint and print its next token")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    transformers.utils.logging.disable_progress_bar()
    if args.load:
        print(int(load(args.load, "auto")(torch.tensor([[1, 2, 3]])).logits[0, -1].argmax()))
        return
    if args.gradients:
        for name, case in SMALL.items():
            if case.gradients:
                write_gradients(case, args.gradients / name)
        return
    summary = {"seed": args.seed, "torch": torch.__version__, "transformers": transformers.__version__, "cases": {}}
    for name, case in (SMALL | FULL_WIDTH if args.full_width else SMALL).items():
        summary["cases"][name] = write_case(name, case, args.seed, args.out)
        print(name, summary["cases"][name], flush=True)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
