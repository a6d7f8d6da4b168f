"""info."""

from __future__ import annotations

import dataclasses
import math
import re

from absl import flags

from ernie_jax.chips import CHIPS
from ernie_jax.cli import models
from ernie_jax.cli.command import Command, require
from ernie_jax.config import ModelConfig

_USED = 0.95  # of a device's memory for weights and cache; the rest stays free for temporaries
_GROUPS = (
    ("embedding", r"embed\."),
    ("attention", r"layers\.\d+\.attention\."),
    ("dense MLP", r"layers\.\d+\.mlp\.(gate_up|down)\."),
    ("routers", r"layers\.\d+\.mlp\.router\."),
    ("routed experts", r"layers\.\d+\.mlp\.experts\."),
    ("shared experts", r"layers\.\d+\.mlp\.shared\."),
    ("norms", r"(layers\.\d+\.\w+_)?norm\."),
    ("head", r"head\."),
    ("multi-token prediction", r"mtp\."),
)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "model",
        None,
        f"a checkpoint or Hugging Face directory, a hub id, or a preset ({', '.join(models.presets())})",
        flag_values=values,
    )
    flags.DEFINE_string("revision", None, "branch, tag or commit of a hub id", flag_values=values)
    flags.DEFINE_string("dtype", None, "count the weights in this dtype", flag_values=values)


def _info(values: flags.FlagValues) -> None:
    from ernie_jax.checkpoint import parse_dtype
    from ernie_jax.engine.cache import bytes_per_token
    from ernie_jax.model import parameter_specs

    require(values, "model")
    config, stored, source = models.read_model(values.model, values.revision)
    dtype = parse_dtype(values.dtype or stored)
    print(f"{values.model} ({source})\n")
    for field in dataclasses.fields(config):
        print(f"  {field.name:<26}{getattr(config, field.name)}")
    specs = parameter_specs(config, dtype)
    print(f"\n  {'parameters':<26}{'count':>18}{'bytes':>18}")
    total = 0
    for group, pattern in _GROUPS:
        chosen = [spec for name, spec in specs.items() if re.match(pattern, name)]
        count = sum(math.prod(spec.shape) for spec in chosen)
        size = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in chosen)
        total += size
        if count:
            print(f"  {group:<26}{count:>18,}{size:>18,}")
    print(f"  {'total':<26}{sum(math.prod(s.shape) for s in specs.values()):>18,}{total:>18,}")
    print(f"  {'read for one token':<26}{_active(config, specs):>18,}")
    per_token = bytes_per_token(config, dtype)
    print(
        f"\n  KV cache: {per_token:,} bytes a token, {per_token * config.max_position_embeddings / 1e9:.2f} GB for "
        f"{config.max_position_embeddings:,} tokens"
    )
    print(f"\n  {'chip':<18}{'fewest':>8}{'tokens of KV cache left':>28}   ({dtype.name} weights, evenly spread)")
    for chip in CHIPS.values():
        memory = _USED * chip.devices * chip.device_memory
        chips = 1 << max(0, math.ceil(math.log2(total / memory)))
        print(f"  {chip.title:<18}{chips:>8}{int((chips * memory - total) // per_token):>28,}")
    print("\n  `main.py plan` answers for one slice or host in detail")


def _active(config: ModelConfig, specs: dict) -> int:
    """Count the parameters that one token's forward pass reads, head included."""
    count = sum(math.prod(spec.shape) for name, spec in specs.items() if not name.startswith("mtp."))
    routed = sum(math.prod(spec.shape) for name, spec in specs.items() if ".experts." in name)
    untied = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return count - routed - untied + (routed * config.moe_k // config.moe_num_experts if routed else 0)


INFO = Command(
    "info",
    "Show a model's configuration, its parameters by group with their bytes, and what it fits on.",
    ("main.py info --model=ernie-4.5-21b-a3b", "main.py info --model=checkpoints/21b --dtype=float32"),
    _define,
    _info,
)
