"""What --model means on the command line, and the flags that come with it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import zlib

from absl import flags

from ernie_jax import distributed
from ernie_jax.cli.command import require
from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.paths import cache_directory, storage_path

_PACKAGE = pathlib.Path(__file__).parent.parent
_SAMPLING = {
    "temperature": (flags.DEFINE_float, "divides the logits; 0 is greedy"),
    "top_p": (flags.DEFINE_float, "keep the smallest set of likeliest tokens with this mass"),
    "top_k": (flags.DEFINE_integer, "keep this many likeliest tokens; 0 is off"),
    "min_p": (flags.DEFINE_float, "drop tokens less likely than this fraction of the likeliest"),
    "repetition_penalty": (flags.DEFINE_float, "divides the logits of tokens that occurred; 1 is off"),
    "frequency_penalty": (flags.DEFINE_float, "subtracted once per occurrence in the output"),
    "presence_penalty": (flags.DEFINE_float, "subtracted if the token occurs in the output"),
    "seed": (flags.DEFINE_integer, "makes sampling repeatable; also draws --random_weights"),
}


def data_directory(name: str, in_checkout: str) -> pathlib.Path:
    """Return a folder of data: inside the package when installed from a wheel, else in the checkout."""
    packaged = _PACKAGE / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / in_checkout


def presets() -> dict[str, pathlib.Path]:
    """Map preset names to the config files in configs/."""
    return {path.stem: path for path in sorted(data_directory("configs", "configs").glob("ernie-4.5-*.json"))}


def embedded_model() -> pathlib.Path:
    """Return the directory of the small model that comes with the project, in Hugging Face format."""
    return data_directory("embedded", "models/ernie-embedded")


def define_model_flags(values: flags.FlagValues) -> None:
    """Define the flags that choose a model and size its engine."""
    flags.DEFINE_string(
        "model",
        None,
        "a checkpoint directory, a Hugging Face directory or hub id (converted once into a cache folder), or a preset "
        f"({', '.join(presets())}) with --random_weights",
        flag_values=values,
    )
    flags.DEFINE_string("revision", None, "branch, tag or commit of a hub id", flag_values=values)
    flags.DEFINE_string("adapter", None, "an adapter that was trained on the model (main.py train)", flag_values=values)
    flags.DEFINE_bool("random_weights", False, "draw weights instead of loading them", flag_values=values)
    flags.DEFINE_string("dtype", None, "bfloat16, float32 or float16; default: the checkpoint's", flag_values=values)
    flags.DEFINE_string("quantize", None, "int8, fp8 or int4: draw --random_weights so", flag_values=values)
    define_quantize_embedding(values)
    flags.DEFINE_integer("cache_tokens", None, "tokens in the KV cache; default: what fits", flag_values=values)
    define_kv_dtype(values)
    flags.DEFINE_integer("prefill_chunk", None, "most prompt tokens in a step (GPU 8192, else 512)", flag_values=values)
    flags.DEFINE_integer(
        "mixed_chunk",
        None,
        "most prompt tokens in a step beside sequences that decode (GPU 2048, TPU 256, CPU 128)",
        flag_values=values,
    )
    flags.DEFINE_list(
        "ops",
        [],
        "backends of ops, as experts=dense,attention=xla,linear=xla,router=xla,exchange=padded; default: by platform "
        "and shape",
        flag_values=values,
    )
    define_layout_flags(values)


def define_quantize_embedding(values: flags.FlagValues) -> None:
    """Define the flag that rounds the embedding beside --quantize."""
    text = "with --quantize: the embedding, and a head of its own, in int8 too"
    flags.DEFINE_bool("quantize_embedding", False, text, flag_values=values)


def define_kv_dtype(values: flags.FlagValues) -> None:
    """Define the flag that gives the KV cache a dtype of its own."""
    flags.DEFINE_string("kv_dtype", None, "of the KV cache: bfloat16, int8 or fp8; default: dtype", flag_values=values)


def define_recipe_flags(values: flags.FlagValues) -> None:
    """Define the flags that name a recipe and override its fields."""
    flags.DEFINE_string("config", None, "the recipe, a TOML file of configs/", flag_values=values)
    flags.DEFINE_multi_string(
        "set", [], "name=value: override a recipe field, or one in a table: sources.chat.times=2", flag_values=values
    )


def define_layout_flags(values: flags.FlagValues, default: str = "by the model and the devices") -> None:
    """Define the flags that spread a model over devices.

    Args:
      default: what happens without them, for the help text.
    """
    flags.DEFINE_string(
        "mesh",
        None,
        "how many devices share what, as expert:8 or data:2,expert:4; axes: data, expert, tensor",
        flag_values=values,
    )
    flags.DEFINE_string(
        "sharding",
        None,
        f"single, expert, expert+tensor, expert+data, exchange, tensor or fsdp; default: {default}",
        flag_values=values,
    )


def define_sampling_flags(values: flags.FlagValues, max_new_tokens: int) -> None:
    """Define the sampling flags; those not given take the checkpoint's recommendation."""
    flags.DEFINE_integer("max_new_tokens", max_new_tokens, "most tokens to generate", flag_values=values)
    for name, (define, text) in _SAMPLING.items():
        define(name, None, text, flag_values=values)
    flags.DEFINE_multi_string("stop", [], "a string that ends the text", flag_values=values)
    flags.DEFINE_bool("ignore_eos", False, "go on after the end-of-sequence token", flag_values=values)


def sampling_fields(values: flags.FlagValues) -> dict:
    """Return the SamplingParams fields that the flags set.

    Raises:
      UserError: if one is out of range; before a large model is loaded for nothing.
    """
    from ernie_jax.engine import SamplingParams  # imports JAX

    names = (*_SAMPLING, "max_new_tokens", "stop", "ignore_eos")
    fields = {name: values[name].value for name in names if values[name].value is not None}
    SamplingParams.from_dict(fields)
    return fields


def load(values: flags.FlagValues, **options):
    """Load the model that the flags name and print where it runs; returns an LLM.

    Raises:
      UserError: if --model is nothing that can be loaded.
    """
    from ernie_jax.llm import LLM  # imports JAX

    require(values, "model")
    use_compilation_cache()
    names = ("cache_tokens", "max_sequences", "prefill_chunk", "mixed_chunk", "kv_dtype")
    options = {name: values[name].value for name in names if name in values} | options
    options |= _backends(values.ops) | {"mesh": values.mesh, "sharding": values.sharding}
    if values.adapter and (values.random_weights or values.model in presets()):
        raise UserError("--adapter goes with a model that has weights")
    if values.model in presets():
        if not values.random_weights:
            raise UserError(
                f"--model={values.model} is a preset without weights: add --random_weights, or name a checkpoint"
            )
        config = ModelConfig.from_file(presets()[values.model])
        # Multi-token prediction is not used in generation: save the memory.
        forms = {"quantize": values.quantize, "quantize_embedding": values.quantize_embedding}
        config = dataclasses.replace(config, num_nextn_predict_layers=0, **forms)
        if "tokenizer" in values:
            options["tokenizer"] = values.tokenizer
        llm = LLM.random(config, values.dtype or "bfloat16", values.seed or 0, **options)
    elif values.random_weights:
        raise UserError(f"--random_weights goes with a preset ({', '.join(presets())}), not --model={values.model}")
    elif values.quantize or values.quantize_embedding:
        given = "--quantize" if values.quantize else "--quantize_embedding"
        raise UserError(
            f"{given} goes with --random_weights, and --model={values.model} has weights: make a checkpoint of that "
            "form with `main.py convert --quantize`"
        )
    else:
        directory = checkpoint_directory(values.model, values.revision)
        llm = LLM.load(directory, values.dtype, progress=distributed.is_primary(), adapter=values.adapter, **options)
    distributed.say(llm.describe())
    return llm


def read_model(model: str, revision: str | None) -> tuple[ModelConfig, str, str]:
    """Return the config, the stored dtype, and what kind of thing --model is; reads no weights.

    Raises:
      UserError: if it is no preset, checkpoint or Hugging Face model.
    """
    from convert.source import Source
    from ernie_jax.checkpoint import is_checkpoint, read_config, read_manifest

    if model in presets():
        return ModelConfig.from_file(presets()[model]), "bfloat16", "preset"
    if is_checkpoint(model):
        return read_config(model), read_manifest(model)["dtype"], "converted checkpoint"
    source = Source(model, revision)
    if "config.json" not in source.files():
        raise UserError(f"--model={model}: not a model directory (no manifest.json, no config.json)")
    fields = source.read_json("config.json")
    config = ModelConfig.from_hf(fields, f"{model}/config.json")
    return config, fields.get("dtype") or fields.get("torch_dtype") or "bfloat16", "Hugging Face model"


def checkpoint_directory(model: str, revision: str | None = None) -> str:
    """Return the converted checkpoint that --model means, converting a Hugging Face source into the cache.

    That happens once; a directory whose files have changed since is converted again.

    Raises:
      UserError: if it is no checkpoint, Hugging Face directory or hub id.
    """
    from convert import convert, is_hub_id
    from convert.source import Source
    from ernie_jax.checkpoint import MANIFEST, is_checkpoint, read_manifest

    path = storage_path(model)
    digest = zlib.crc32((path / MANIFEST).read_bytes()) if is_checkpoint(path) else None
    distributed.agree({f"the checksum of {model}/{MANIFEST}": digest})
    if path.exists():
        if digest is not None or (path / "params").exists():
            read_manifest(path)  # raises unless it is a finished checkpoint
            return model
        if not (path / "config.json").exists():
            raise UserError(
                f"--model={model}: not a model directory, neither a checkpoint (no manifest.json) nor Hugging Face's "
                "(no config.json)"
            )
        identity = json.dumps([str(path.resolve()), Source(model, revision).files()], sort_keys=True)
    elif is_hub_id(model):
        identity = model + (f"@{revision}" if revision else "")
    else:
        raise UserError(
            f"--model={model}: no such directory, and neither a preset ({', '.join(presets())}) nor a hub id like "
            "baidu/ERNIE-4.5-21B-A3B-PT"
        )
    target = cache_directory() / "checkpoints" / f"{path.name}-{hashlib.sha256(identity.encode()).hexdigest()[:10]}"
    target = distributed.broadcast(str(target))
    if not all(there := distributed.gather(is_checkpoint(target))):
        if any(there):
            raise UserError(
                f"{target} is not there in process {there.index(False)} but in process {there.index(True)}; convert "
                f"{model} to a directory that all processes share, and give that as --model"
            )
        distributed.say(f"converting {model} once into {target}")
        convert(model, target, revision=revision)
    return target


def _backends(ops: list[str]) -> dict[str, str]:
    """Turn OP=BACKEND pairs into fields of EngineOptions, which checks the backends' names."""
    fields = {op: f"{op}_backend" for op in ("attention", "exchange", "halves", "linear", "router")}
    fields["experts"] = "expert_backend"
    chosen = {}
    for pair in ops:
        op, _, backend = pair.partition("=")
        if op not in fields:
            raise UserError(f"--ops={pair}: write OP=BACKEND, where OP is one of {', '.join(fields)}")
        chosen[fields[op]] = backend
    return chosen


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, so that the second start is quick."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        folder = cache_directory() / "compiled"
        with contextlib.suppress(OSError):  # a read-only home only costs the cache
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))
            # A server has some fifty samplers, each of which compiles in less than the second that is JAX's bound.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
