"""bench."""

from __future__ import annotations

import functools
import gc
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from ernie_jax.cli import hosts, models
from ernie_jax.cli.command import Command, require
from ernie_jax.config import ModelConfig
from ernie_jax.distributed import broadcast, is_primary
from ernie_jax.errors import UserError

_BATCH, _PREFILL = "1,8,64", "1x2048,8x2048,1x8192"
_LENGTHS, _LENGTHS_ALONE = (64, 256), (32, 512)  # a single sequence's steps are short: more of them


def _define(values: flags.FlagValues) -> None:
    models.define_model_flags(values)
    flags.DEFINE_integer("seed", 0, "draws --random_weights and the prompts", flag_values=values)
    flags.DEFINE_list(
        "batch",
        None,
        f"sequences decoded together, each a row; 1x32768 is one with a context of its own (default: {_BATCH})",
        flag_values=values,
    )
    flags.DEFINE_list("context", ["128"], "prompt tokens of each, before decoding", flag_values=values)
    flags.DEFINE_list(
        "prefill",
        None,
        f"prompts x tokens of each, each a row; --prefill= for none (default: {_PREFILL})",
        flag_values=values,
    )
    flags.DEFINE_list(
        "lengths",
        None,
        "new tokens of the two runs whose difference is timed (default: {},{}; of a single sequence {},{})".format(
            *_LENGTHS, *_LENGTHS_ALONE
        ),
        flag_values=values,
    )
    flags.DEFINE_integer("repeats", 5, "runs of each, of which the median counts", flag_values=values)
    flags.DEFINE_float("spread", 0.0, "how much decoded prompts differ in length, 0 to 0.9", flag_values=values)
    flags.DEFINE_float("time_limit", None, "start no further row after so many seconds", flag_values=values)
    flags.DEFINE_string("profile", None, "also trace each row into this directory", flag_values=values)
    flags.DEFINE_bool("json", False, "print one JSON object; the table goes to stderr", flag_values=values)
    hosts.define_flags(values)


def _bench(values: flags.FlagValues) -> int:
    require(values, "model")
    hosts.join(values)
    config, _, _ = models.read_model(values.model, values.revision)
    cases = _cases(values, config)
    from ernie_jax.bench import report

    bench = _Bench(values, max(case.batch for case in cases))
    bench.start(next((case.context for case in cases), 1))
    bench.say("\n" + report.HEADER)
    try:
        for case in cases:
            bench.row(case)
    finally:  # what was measured, whatever happens
        if values.json and is_primary():
            print(json.dumps(bench.found))
    return int(bench.failed)


class _Bench:
    """A model on the way through its cases.

    Attributes:
      found: what `--json` prints.
      failed: whether a case did.
    """

    def __init__(self, values: flags.FlagValues, max_sequences: int):
        """Measure the machine, then load the model."""
        import jax
        import numpy as np
        from flax import nnx

        from ernie_jax.bench import report
        from ernie_jax.bench.machine import measure_machine, process_age
        from ernie_jax.bench.ops import TracedOps
        from ernie_jax.engine.cache import kv_name

        self._values = values
        self._rng = np.random.default_rng(values.seed)
        self._begun = time.monotonic()
        self.failed = False
        self._traced = TracedOps()
        device = jax.local_devices()[0]
        ready = process_age()
        self.machine = measure_machine(device)
        start = time.monotonic()
        self._llm = models.load(values, max_sequences=max_sequences)
        jax.block_until_ready(nnx.state(self._llm.model))
        self.found: dict[str, Any] = {
            "model": values.model,
            "random_weights": values.random_weights,
            "jax": jax.__version__,
            "device": device.device_kind,
            "devices": self._llm.layout.mesh.size,
            "sharding": self._llm.layout.describe(),
            "dtype": np.dtype(self._llm.engine.dtype).name,
            "quantize": self._llm.config.quantize,
            "quantize_embedding": self._llm.config.quantize_embedding,
            "kv_dtype": kv_name(self._llm.engine.kv_dtype),
            "ops": self._llm.engine.describe_ops(),
            "prefill_chunk": self._llm.engine.options.prefill_chunk,
            "cache_tokens": self._llm.engine.cache_tokens,
            "machine": vars(self.machine),
            "start": {"python_seconds": ready, "weights_seconds": time.monotonic() - start},
            "rows": [],
        }
        drawn = " with random weights" if values.random_weights else ""
        drawn += f" · {self._llm.config.forms} weights" if self._llm.config.forms else ""
        found = self.found
        self.say(
            f"{values.model}{drawn} · {found['dtype']} · {found['devices']} x {found['device']} · JAX {found['jax']} · "
            f"sharding {found['sharding']} · prefill chunks of {found['prefill_chunk']} · "
            f"{found['kv_dtype']} KV room for {found['cache_tokens']:,} tokens\n{report.describe_machine(self.machine)}"
        )

    def say(self, words: str) -> None:
        """Print for people, at once."""
        if is_primary():
            print(words, file=sys.stderr if self._values.json else sys.stdout, flush=True)

    def start(self, context: int) -> None:
        """Answer a first prompt, which compiles its programs, and say how long it took from nothing to here."""
        from ernie_jax.bench import drive

        prompts = drive.random_prompts(self._llm.engine, self._rng, [context])
        begun = time.monotonic()
        with self._traced.noting():
            _, problem = self._attempt(lambda: drive.run(self._llm.engine, prompts, 2))
        start = self.found["start"]
        start["compile_seconds"] = time.monotonic() - begun
        start["seconds"] = sum(start.values())
        self.say(
            f"start {start['seconds']:.1f} s: Python and JAX {start['python_seconds']:.1f}, weights "
            f"{start['weights_seconds']:.1f}, first answer (its programs compiled or read from the cache) "
            f"{start['compile_seconds']:.1f}" + (f"; {problem}" if problem else "")
        )

    def row(self, case) -> None:
        """Measure a case and print its row, or why there is none."""
        from ernie_jax.bench import report
        from ernie_jax.bench.measure import measure

        values = self._values
        spread = _spread(values, case)
        row, problem = None, "left out: --time_limit is over"
        if not self._over():
            row, problem = self._attempt(
                lambda: measure(
                    self._llm.engine,
                    self._llm.layout,
                    case,
                    self.machine,
                    self._traced,
                    self._rng,
                    values.repeats,
                    spread,
                )
            )
        if row is None:
            self.say(f"{report.name(case):<20}{problem}")
            self.found["rows"].append(
                {"kind": case.kind, "batch": case.batch, "context": case.context, "problem": problem}
            )
            return
        self.say(report.line(row))
        self.found["rows"].append(row.to_object())
        if case.kind == "decode" and self._llm.config.is_moe:
            self._count_experts(row)
        if values.profile:
            self._trace(case)

    def _count_experts(self, row) -> None:
        from ernie_jax.bench import routing

        model, layout = self._llm.model, self._llm.layout
        reached, problem = self._attempt(lambda: routing.distinct_experts(model, layout, row.sequences))
        even = routing.even_experts(self._llm.config, row.case.batch)
        self.found["rows"][-1] |= {"experts": reached, "even_experts": even}
        counted = f"{reached:.1f}" if reached else problem
        self.say(f"  distinct experts a layer and step: {counted}; {even:.1f} if routing is even, as the floor assumes")

    def _trace(self, case) -> None:
        from ernie_jax.bench import profile, report

        directory = pathlib.Path(self._values.profile) / report.name(case).replace(" ", "")
        found, problem = self._attempt(lambda: profile.trace(self._llm.engine, case, self._rng, directory))
        if found is None:
            self.say(f"  no profile: {problem}")
            return
        self.say(f"  {directory}: " + ("one prefill" if case.kind == "prefill" else f"{profile.STEPS} steps"))
        self.say("\n".join(report.largest(found)))
        self.found["rows"][-1]["kernels"] = [kernel._asdict() for kernel in found.kernels]

    def _attempt(self, work: Callable[[], Any]) -> tuple[Any, str | None]:
        """Return what some work gives, or None and what went wrong; then the engine is made anew."""
        try:
            return work(), None
        except UserError as error:
            problem = str(error)
        except Exception as error:  # out of memory, a kernel that does not compile: the other cases may still run
            problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
        self.failed = True
        if self._llm.engine.has_work:
            self._renew()
        return None, f"failed: {problem}"

    def _renew(self) -> None:
        """Make the engine again: a step that failed may have taken the cache with it."""
        from ernie_jax.engine import Engine

        old, self._llm.engine = self._llm.engine, None
        make = functools.partial(
            Engine, self._llm.model, self._llm.layout, old.options, valid_vocab=old.valid_vocab, stop_ids=old.stop_ids
        )
        del old
        gc.collect()  # frees the old cache before there is a new one
        self._llm.engine = make()

    def _over(self) -> bool:
        limit = self._values.time_limit
        return broadcast(limit is not None and time.monotonic() - self._begun > limit)


def _cases(values: flags.FlagValues, config: ModelConfig) -> list:
    """Read the cases from the flags; defaults that exceed the model's context are left out.

    Raises:
      UserError: naming a flag with a bad value.
    """
    from ernie_jax.bench.measure import Decode, Prefill

    most = config.max_position_embeddings
    if values.repeats < 1:
        raise UserError(f"--repeats={values.repeats}: it must be at least 1")
    if not 0 <= values.spread <= 0.9:
        raise UserError(f"--spread={values.spread:g}: it must be between 0 and 0.9")
    if values.profile and pathlib.Path(values.profile).is_file():
        raise UserError(f"--profile={values.profile} is a file; name a directory")
    lengths = None
    if values.lengths is not None:
        lengths = [_number("lengths", text) for text in values.lengths]
        if len(lengths) != 2 or lengths[0] >= lengths[1]:
            raise UserError(f"--lengths={','.join(values.lengths)}: write a short and a longer one, as 64,256")
    contexts = [_number("context", text) for text in values.context]
    cases = []
    for text in _BATCH.split(",") if values.batch is None else values.batch:
        batch, *own = _numbers("batch", text, 2)
        for context in own or contexts:
            case = Decode(batch, context, *(lengths or (_LENGTHS_ALONE if batch == 1 else _LENGTHS)))
            if round(context * (1 + _spread(values, case))) + case.long > most:
                raise UserError(
                    f"--context={context} with {case.long} new tokens (--lengths) exceeds the model's context of {most}"
                )
            cases.append(case)
    for text in _PREFILL.split(",") if values.prefill is None else values.prefill:
        batch, context = _numbers("prefill", text, 2, least=2)
        if context < most:
            cases.append(Prefill(batch, context))
        elif values.prefill is not None:
            raise UserError(f"--prefill={text}: the prompts and a new token exceed the model's context of {most}")
    if not cases:
        raise UserError("nothing to measure; give --batch or --prefill")
    return cases


def _spread(values: flags.FlagValues, case) -> float:
    """Return how much a case's prompts differ in length; a single one is as long as it is said to be."""
    return values.spread if case.kind == "decode" and case.batch > 1 else 0.0


def _number(flag: str, text: str) -> int:
    return _numbers(flag, text, 1)[0]


def _numbers(flag: str, text: str, most: int, least: int = 1) -> list[int]:
    """Read whole numbers from 1 on, with an x between them."""
    parts = text.lower().split("x")
    if not least <= len(parts) <= most or not all(part.isdecimal() and int(part) for part in parts):
        form = "SEQUENCESxTOKENS, as 8x2048" if least == 2 else "a whole number from 1 on"
        form += ", or SEQUENCESxTOKENS" if most > least else ""
        raise UserError(f"--{flag}={text}: write {form}")
    return [int(part) for part in parts]


BENCH = Command(
    "bench",
    "Measure how fast a model decodes and reads prompts here, and hold it against what this machine's memory and "
    "arithmetic allow, which are measured first. A decode step is the difference of two greedy runs of different "
    "length, over prompts of random tokens; a prefill goes from submit to the last first token. The floor is the "
    "fewest bytes (of the experts: those that even routing reaches) or operations over the measured rates.",
    (
        "main.py bench --model=ernie-4.5-21b-a3b --random_weights --batch=1,8,64,1x32768 --prefill=1x2048,8x2048",
        "main.py bench --model=checkpoints/21b --batch=64 --context=128,4096 --profile=traces",
        "main.py bench --model=checkpoints/21b --sharding=expert --json",
    ),
    _define,
    _bench,
)
