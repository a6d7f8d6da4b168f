"""experts."""

from __future__ import annotations

import json
import pathlib

import numpy as np
from absl import flags

from ernie_jax.cli import heatmap, hosts, models
from ernie_jax.cli.command import Command, require
from ernie_jax.cli.generate import check_prompt
from ernie_jax.cli.jsonl import read_objects, read_text
from ernie_jax.distributed import gather, is_primary, say
from ernie_jax.errors import UserError

_FIELDS = ("prompt", "text", "token_ids", "messages")
_PIECE = 4096  # tokens of a plain text that are read as one
_BARS = "▁▂▃▄▅▆▇█"
_MEAN = 4  # of the bars, that of the mean load
_BUSIEST = 3


def _define(values: flags.FlagValues) -> None:
    models.define_model_flags(values)
    flags.DEFINE_integer("seed", None, "draws --random_weights", flag_values=values)
    flags.DEFINE_string(
        "input",
        None,
        'a .jsonl file of {"prompt"|"text"|"token_ids"|"messages"} objects; any other is read as plain text',
        flag_values=values,
    )
    flags.DEFINE_string("output", None, "a PNG of layers and experts to draw", flag_values=values)
    flags.DEFINE_bool("json", False, "print one JSON object, with all counts", flag_values=values)
    hosts.define_flags(values)


def _experts(values: flags.FlagValues) -> None:
    from tqdm import tqdm

    require(values, "model", "input")
    if values.output is not None:
        heatmap.check()
        if not (folder := pathlib.Path(values.output).parent).is_dir():
            raise UserError(f"--output={values.output}: there is no directory {folder}")
    hosts.join(values)
    records = read_objects(values.input) if values.input.endswith(".jsonl") else read_text(values.input)
    if not records:
        raise UserError(f"--input={values.input}: it is empty")
    llm = models.load(values)
    config = llm.config
    if not config.moe_layers:
        raise UserError(f"--model={values.model}: this model has no experts")
    if isinstance(records, str):
        ids = llm.encode(records)
        most = min(_PIECE, config.max_position_embeddings, llm.engine.group_tokens)
        texts = [ids[start : start + most] for start in range(0, len(ids), most)]
    else:
        try:
            texts = [_read(llm, number, record) for number, record in enumerate(records, 1)]
        except UserError as error:
            raise UserError(f"--input={values.input}: {error}") from None
    total, hidden = sum(map(len, texts)), not is_primary()
    with tqdm(total=total, unit="token", desc="experts", mininterval=0.5, disable=hidden) as bar:
        for index, _ in llm.engine.score(texts):
            bar.update(len(texts[index]))
    load = np.sum(gather(llm.engine.expert_load().tolist()), axis=0)
    if hidden:
        return
    name = values.model.rstrip("/").rpartition("/")[2]
    about = f"{total:,} tokens of {pathlib.Path(values.input).name}, {config.moe_k} of {config.moe_num_experts} experts"
    about += " a token and layer"
    print(_record(name, total, config, load) if values.json else _table(f"{name}: {about}", config.moe_layers, load))
    if values.output is not None:
        heatmap.draw(values.output, load, config.moe_layers, f"Load of {name}'s experts", about)
        say(f"drew {values.output}")


def _read(llm, number: int, record: dict | UserError) -> list[int]:
    """Return the token ids of an input line; errors name the line."""
    if isinstance(record, UserError):
        raise record
    try:
        fields = {name: value for name, value in record.items() if name != "tools" or "messages" not in record}
        if unknown := sorted(set(fields) - set(_FIELDS)):
            known = f"{', '.join(_FIELDS)}, and tools to messages"
            raise UserError(f"unknown field {', '.join(unknown)}; known are {known}")
        if len(fields) != 1:
            raise UserError(f"give exactly one of {', '.join(_FIELDS)}")
        [(name, value)] = fields.items()
        prompt = check_prompt(name, value)
        ids = llm.encode(record if name == "messages" else prompt)
        llm.engine.check_length(ids)
    except UserError as error:
        raise UserError(f"line {number}: {error}") from None
    return ids


def _record(name: str, tokens: int, config, load: np.ndarray) -> str:
    rows = []
    for layer, counts in zip(config.moe_layers, load, strict=True):
        summary = {"max_over_mean": counts.max() / counts.mean(), "dead": _dead(counts)}
        rows.append({"layer": layer, **summary, "tokens": counts.tolist()})
    record = {"model": name, "tokens": tokens, "experts": config.moe_num_experts, "experts_per_token": config.moe_k}
    return json.dumps(record | {"layers": rows})


def _table(heading: str, layers: tuple[int, ...], load: np.ndarray) -> str:
    """Return a line for each layer, and which experts nobody chose."""
    bars = f"load by expert ({_BARS[_MEAN - 1]} is the mean)"
    lines = [heading, "", f"layer  max/mean  min/mean  dead  {'busiest experts, their shares':<34}  {bars}"]
    silent = []
    for layer, counts in zip(layers, load, strict=True):
        ratios, dead = counts / counts.mean(), _dead(counts)
        order = np.argsort(-counts, kind="stable")[:_BUSIEST]
        busiest = "  ".join(f"{expert:>3} {counts[expert] / counts.sum():>6.2%}" for expert in order)
        numbers = f"{layer:>5}  {ratios.max():>8.2f}  {ratios.min():>8.2f}  {len(dead):>4}"
        lines.append(f"{numbers}  {busiest:<34}  {''.join(map(_bar, ratios))}")
        if dead:
            silent.append(f"layer {layer}: {', '.join(map(str, dead))}")
    return "\n".join([*lines, "", "experts that no token chose: " + ("; ".join(silent) or "none")])


def _bar(ratio: float) -> str:
    return _BARS[min(max(round(ratio * _MEAN), 1), len(_BARS)) - 1] if ratio else "·"


def _dead(counts: np.ndarray) -> list[int]:
    return np.flatnonzero(counts == 0).tolist()


EXPERTS = Command(
    "experts",
    "Run a model over texts and show how often each expert of each layer was chosen: which share the busiest have, how "
    "far the load is from even, and which experts no token chose. A plain text is read in pieces of up to "
    f"{_PIECE} tokens.",
    (
        "main.py experts --model=checkpoints/21b --input=book.txt --output=load.png",
        "main.py experts --model=checkpoints/21b --input=chats.jsonl --json",
    ),
    _define,
    _experts,
)
