"""convert, export and verify."""

from __future__ import annotations

import sys

from absl import flags

from ernie_jax.cli import hosts, models
from ernie_jax.cli.command import Command, require
from ernie_jax.distributed import say


def _define_convert(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "source",
        None,
        "Hugging Face directory (local or gs://) or hub id; with --quantize also a converted checkpoint",
        flag_values=values,
    )
    flags.DEFINE_string("revision", None, "branch, tag or commit of a hub id", flag_values=values)
    flags.DEFINE_string("target", None, "directory of the new checkpoint (local or gs://)", flag_values=values)
    flags.DEFINE_string("dtype", None, "bfloat16, float32 or float16; default: as stored", flag_values=values)
    flags.DEFINE_string(
        "quantize", None, "int8, fp8 or int4: round the weights of attention, MLPs and experts so", flag_values=values
    )
    models.define_quantize_embedding(values)
    flags.DEFINE_string(
        "calibration",
        None,
        "with --quantize: a text (.txt, JSON lines of training, .npy) on which rounding is to change the outputs least",
        flag_values=values,
    )
    flags.DEFINE_float("host_memory_gb", 4.0, "memory that each process may use", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "replace a checkpoint at --target", flag_values=values)
    flags.DEFINE_bool("keep_download", False, "keep downloaded shards once they are written", flag_values=values)
    hosts.define_flags(values)


def _convert(values: flags.FlagValues) -> None:
    import convert

    require(values, "source", "target")
    hosts.join(values, devices=False)
    convert.convert(
        values.source,
        values.target,
        revision=values.revision,
        dtype=values.dtype,
        quantize=values.quantize,
        quantize_embedding=values.quantize_embedding,
        calibration=values.calibration,
        host_memory_gb=values.host_memory_gb,
        overwrite=values.overwrite,
        keep_download=values.keep_download,
    )
    say(f"wrote {values.target}")


def _define_export(values: flags.FlagValues) -> None:
    flags.DEFINE_string("source", None, "a converted checkpoint", flag_values=values)
    flags.DEFINE_string("target", None, "directory of the Hugging Face files", flag_values=values)
    flags.DEFINE_float("host_memory_gb", 4.0, "memory that the export may use", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "replace an earlier export at --target", flag_values=values)


def _export(values: flags.FlagValues) -> None:
    import convert

    require(values, "source", "target")
    hosts.refuse_several("export")
    convert.export(values.source, values.target, host_memory_gb=values.host_memory_gb, overwrite=values.overwrite)
    print(f"wrote {values.target}", file=sys.stderr)


def _define_verify(values: flags.FlagValues) -> None:
    flags.DEFINE_string("source", None, "the directory or hub id that was converted", flag_values=values)
    flags.DEFINE_string("revision", None, "branch, tag or commit of a hub id", flag_values=values)
    flags.DEFINE_string("target", None, "the converted checkpoint", flag_values=values)


def _verify(values: flags.FlagValues) -> int:
    import convert
    from ernie_jax.checkpoint import read_config

    require(values, "source", "target")
    differences = convert.verify(values.source, values.target, revision=values.revision)
    for difference in differences:
        print(difference)
    if differences:
        print(f"differences: {len(differences)}")
    else:
        quantized = read_config(values.target).forms
        print(f"equal but for the rounding to {quantized}" if quantized else "equal")
    return int(bool(differences))


CONVERT = Command(
    "convert",
    "Make a self-contained Orbax checkpoint from a Hugging Face directory or hub id. Streams, so memory stays small; "
    "started again after an interruption, it goes on where it was. Several processes, on hosts that share the target, "
    "convert a part each.",
    (
        "main.py convert --source=baidu/ERNIE-4.5-21B-A3B-PT --target=checkpoints/21b",
        "main.py convert --source=downloads/ERNIE-4.5-21B-A3B-PT --target=gs://bucket/21b",
        "main.py convert --source=baidu/ERNIE-4.5-21B-A3B-PT --target=checkpoints/21b-int8 --quantize=int8",
        "main.py convert --source=checkpoints/21b --target=checkpoints/21b-int4 --quantize=int4",
        "main.py convert --source=checkpoints/21b --target=checkpoints/21b-gptq --quantize=int4 --calibration=text.txt",
        "main.py convert --source=... --target=... --coordinator=host0:8476 --num_processes=4 --process_id=2",
    ),
    _define_convert,
    _convert,
)
EXPORT = Command(
    "export",
    "Write a checkpoint's tensors as Hugging Face safetensors, names, dtypes and bytes as they came.",
    ("main.py export --source=checkpoints/21b --target=exported/21b",),
    _define_export,
    _export,
)
VERIFY = Command(
    "verify",
    "Compare every tensor of a checkpoint with its source. Exits with 1 and names what differs. Of quantised weights "
    "it tells the relative error, which must be small.",
    ("main.py verify --source=downloads/ERNIE-4.5-21B-A3B-PT --target=checkpoints/21b",),
    _define_verify,
    _verify,
)
