"""generate and demo."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags

from ernie_jax.cli import hosts, models
from ernie_jax.cli.command import Command, UsageError
from ernie_jax.cli.jsonl import OrderedWriter, read_objects
from ernie_jax.distributed import is_primary, say
from ernie_jax.errors import UserError

_PROMPT_FIELDS = ("prompt", "token_ids", "messages")
_DEMO_PROMPTS = ("In the beginning God created", "And it came to pass", "李白\n")


def _define(values: flags.FlagValues) -> None:
    models.define_model_flags(values)
    models.define_sampling_flags(values, max_new_tokens=256)
    flags.DEFINE_integer("max_sequences", 64, "sequences decoded at the same time", flag_values=values)
    flags.DEFINE_bool("logprobs", False, "write each new token's log-probability to --output", flag_values=values)
    flags.DEFINE_string("prompt", None, "text to continue; the answer is streamed", flag_values=values)
    flags.DEFINE_string(
        "input",
        None,
        'a JSONL file of {"prompt"|"token_ids"|"messages"} objects, each with sampling fields of its own if it likes',
        flag_values=values,
    )
    flags.DEFINE_string("output", None, "the JSONL file to write, a line per input line", flag_values=values)
    hosts.define_flags(values)


def _generate(values: flags.FlagValues) -> int:
    if (values.prompt is None) == (values.input is None):
        raise UsageError("give either --prompt or --input")
    if (values.input is None) != (values.output is None):
        raise UsageError("--input and --output go together")
    hosts.join(values)
    settings = models.sampling_fields(values) | {"logprobs": values.logprobs}
    if values.input is not None:
        return _generate_file(values, settings)
    if not values.prompt:
        raise UserError("--prompt is empty; give some text")
    stream(models.load(values), values.prompt, settings)
    return 0


def stream(llm, prompt: str, sampling: Mapping[str, Any]) -> None:
    """Print a prompt and its continuation as it comes, then its speed."""
    params = llm.sampling_params(**sampling)
    llm.check(prompt, params)
    print(prompt, end="", flush=True)
    start = time.monotonic()
    first = None
    for chunk in llm.stream([prompt], params):
        first = first or time.monotonic()
        print(chunk.text, end="", flush=True)
    print()
    count = len(chunk.completion.token_ids)
    rate = (count - 1) / max(time.monotonic() - first, 1e-9)
    say(f"[{count} tokens · first after {first - start:.2f} s · then {rate:.1f} tokens/s]")


def _generate_file(values: flags.FlagValues, settings: dict[str, Any]) -> int:
    from tqdm import tqdm

    records = read_objects(values.input)
    work = [values.model, values.revision, values.dtype, values.kv_dtype, settings, list(map(str, records))]
    with OrderedWriter(values.output, work) as writer:
        llm = models.load(values)
        if writer.done:
            say(f"going on after line {writer.done} of an earlier run")
        todo: list[tuple[int, Any, Any]] = []
        for index, record in enumerate(records[writer.done :], writer.done):
            try:
                prompt, params = _read_request(llm, index + 1, record, settings)
                todo.append((index, prompt, params))
            except UserError as error:
                writer.write(index, {"error": str(error)})
        started, tokens = time.monotonic(), 0
        with tqdm(total=len(todo), unit="prompt", desc="generate", mininterval=0.5, disable=not is_primary()) as bar:
            for position, completion in _completions(llm, todo):
                writer.write(todo[position][0], _as_record(completion))
                tokens += len(completion.token_ids)
                bar.set_postfix_str(f"{tokens / (time.monotonic() - started):.0f} tokens/s")
                bar.update()
    say(f"wrote {len(records)} lines to {values.output}, {writer.errors} with an error")
    return int(writer.errors > 0)


def _completions(llm, todo: list) -> Iterator[tuple[int, Any]]:
    for chunk in llm.stream([prompt for _, prompt, _ in todo], [params for _, _, params in todo]):
        if chunk.completion:
            yield chunk.index, chunk.completion


def _read_request(llm, number: int, record: dict | UserError, settings: dict):
    """Return the prompt and sampling settings of an input line; errors name the line."""
    if isinstance(record, UserError):
        raise record
    try:
        given = [name for name in _PROMPT_FIELDS if name in record]
        if len(given) != 1:
            raise UserError(f"give exactly one of {', '.join(_PROMPT_FIELDS)}; found {', '.join(given) or 'none'}")
        prompt = check_prompt(given[0], record[given[0]])
        fields = {name: value for name, value in record.items() if name not in (*_PROMPT_FIELDS, "tools")}
        if "tools" in record:
            if given[0] != "messages":
                raise UserError("tools go with messages")
            prompt = {"messages": prompt, "tools": record["tools"]}
        params = llm.sampling_params(**{**settings, **fields})
        llm.check(prompt, params)
    except UserError as error:
        raise UserError(f"line {number}: {error}") from None
    return prompt, params


def check_prompt(name: str, value: Any) -> Any:
    """Check the type of a line's prompt field: text, ids, or messages.

    Raises:
      UserError: naming the field.
    """
    if name in ("prompt", "text") and not isinstance(value, str):
        raise UserError(f"field {name} must be text")
    if name == "token_ids" and not (
        isinstance(value, list) and all(isinstance(id, int) and not isinstance(id, bool) for id in value)
    ):
        raise UserError("field token_ids must be a list of integers")
    if name == "messages" and not (isinstance(value, list) and all(isinstance(m, dict) for m in value)):
        raise UserError("field messages must be a list of objects")
    return value


def _as_record(completion) -> dict[str, Any]:
    new = len(completion.token_ids)
    record = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "usage": {
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": completion.prompt_tokens + new,
        },
    }
    if completion.logprobs is not None:
        record["logprobs"] = completion.logprobs
    if completion.top_logprobs is not None:
        record["top_logprobs"] = [dict(pairs) for pairs in completion.top_logprobs]
    return record


def _define_demo(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("seed", 0, "makes the sampling repeatable", flag_values=values)


def _demo(values: flags.FlagValues) -> None:
    from ernie_jax.llm import LLM

    hosts.refuse_several("demo")
    models.use_compilation_cache()
    directory = models.checkpoint_directory(str(models.embedded_model()))
    llm = LLM.load(directory, max_sequences=4)
    say(llm.describe())
    for prompt in _DEMO_PROMPTS:
        print()
        stream(llm, prompt, {"max_new_tokens": 96, "seed": values.seed})


GENERATE = Command(
    "generate",
    "Continue a prompt and stream the text, or continue every line of a file. Sampling follows the checkpoint's "
    "generation_config.json where no flag says otherwise; --temperature=0 is greedy. A file that was interrupted goes "
    "on where it was when the same command runs again. Several processes run one model on the devices of all.",
    (
        "main.py generate --model=checkpoints/21b --prompt='The capital of France is' --max_new_tokens=64",
        "main.py generate --model=checkpoints/21b --input=prompts.jsonl --output=answers.jsonl --temperature=0",
        "main.py generate --model=ernie-4.5-21b-a3b --random_weights --input=ids.jsonl --output=out.jsonl",
        "main.py generate --model=... --prompt=... --coordinator=host0:8476 --num_processes=4 --process_id=2",
    ),
    _define,
    _generate,
)
DEMO = Command(
    "demo",
    "Convert the small model that comes with the project (MoE, trained on public-domain English and Chinese text) and "
    "stream a few continuations. Needs no download.",
    ("main.py demo", "main.py demo --seed=7"),
    _define_demo,
    _demo,
)
