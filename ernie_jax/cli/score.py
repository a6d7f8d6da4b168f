"""score."""

from __future__ import annotations

import math

from absl import flags

from ernie_jax.cli import hosts, models
from ernie_jax.cli.command import Command, require
from ernie_jax.cli.generate import check_prompt
from ernie_jax.cli.jsonl import OrderedWriter, read_objects
from ernie_jax.distributed import is_primary, say
from ernie_jax.errors import UserError

_FIELDS = ("text", "token_ids")


def _define(values: flags.FlagValues) -> None:
    models.define_model_flags(values)
    flags.DEFINE_integer("seed", None, "draws --random_weights", flag_values=values)
    flags.DEFINE_string("input", None, 'a JSONL file of {"text"|"token_ids"} objects', flag_values=values)
    flags.DEFINE_string("output", None, "the JSONL file to write, a line per input line", flag_values=values)
    hosts.define_flags(values)


def _score(values: flags.FlagValues) -> int:
    from tqdm import tqdm

    require(values, "input", "output")
    hosts.join(values)
    records = read_objects(values.input)
    work = ["score", values.model, values.revision, values.dtype, values.kv_dtype, values.seed, list(map(str, records))]
    with OrderedWriter(values.output, work) as writer:
        llm = models.load(values)
        if writer.done:
            say(f"going on after line {writer.done} of an earlier run")
        todo = []
        for index, record in enumerate(records[writer.done :], writer.done):
            try:
                todo.append((index, _read_text(llm, index + 1, record)))
            except UserError as error:
                writer.write(index, {"error": str(error)})
        total, hidden = sum(len(ids) for _, ids in todo), not is_primary()
        with tqdm(total=total, unit="token", desc="score", mininterval=0.5, disable=hidden) as bar:
            for position, score in llm.iter_score([ids for _, ids in todo]):
                writer.write(todo[position][0], {"token_ids": score.token_ids, "logprobs": score.logprobs})
                bar.update(len(score.token_ids))
        logprobs = [value for line in writer.lines() for value in line.get("logprobs", [])[1:]]
    if logprobs:
        mean = -math.fsum(logprobs) / len(logprobs)
        print(f"perplexity {math.exp(mean):.4f} over {len(logprobs)} tokens ({mean:.4f} nats each)")
    else:
        print("perplexity: no line has a second token")
    return int(writer.errors > 0)


def _read_text(llm, number: int, record: dict | UserError) -> list[int]:
    """Return the token ids of an input line; errors name the line."""
    if isinstance(record, UserError):
        raise record
    try:
        if unknown := sorted(set(record) - set(_FIELDS)):
            raise UserError(f"unknown field {', '.join(unknown)}; known are {', '.join(_FIELDS)}")
        if len(record) != 1:
            raise UserError(f"give exactly one of {', '.join(_FIELDS)}")
        name, value = next(iter(record.items()))
        ids = llm.encode(check_prompt(name, value))
        llm.engine.check_length(ids)
    except UserError as error:
        raise UserError(f"line {number}: {error}") from None
    return ids


SCORE = Command(
    "score",
    "Give the log-probability of every token of each text, given those before it (null for the first), and the "
    "perplexity of the whole.",
    ("main.py score --model=checkpoints/21b --input=texts.jsonl --output=scores.jsonl",),
    _define,
    _score,
)
