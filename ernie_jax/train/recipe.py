"""Recipe: everything that decides a training run, read from a TOML file."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from ernie_jax.errors import UserError
from ernie_jax.train.sources import LONG_EXAMPLES, read_sources

_INTEGERS = ("steps", "batch_size", "sequence_length", "log_every", "evaluate_every", "save_every")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Describe one training run from random weights. Paths are local or gs://.

    Attributes:
      model: directory with config.json and the tokenizer's files; they are copied into the result.
      data: directory of the sources' files.
      sources: name -> the fields of a sources.Source; or only its `times`, of token ids in NAME.train.npy and
        NAME.heldout.npy.
      output: directory of the run: state/ to resume from, metrics.csv, curve.svg, and at the end checkpoint/.
      batch_size: rows of `sequence_length` tokens in a step.
      learning_rate: at the end of a linear warm-up; from there a cosine leads to `final_learning_rate`.
      long_examples: what becomes of examples longer than a row, of which only a part is learnt: a name of
        sources.LONG_EXAMPLES.
      skip_bad_lines: leave out the lines of the data that can't be learnt from, instead of refusing to start.
      bias_update_rate: step of the routers' correction bias towards equal use of the experts.
      dtype: of the computation and of the result; master weights and optimiser state are float32.
      expert_backend: a name of ops.DIFFERENTIABLE_EXPERT_BACKENDS.

    Raises:
      UserError: naming the field, if a value is out of range.
    """

    model: str
    data: str
    sources: Mapping[str, Any]
    output: str
    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    final_learning_rate: float = 0.0
    warmup_steps: int = 0
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    gradient_clip: float = 1.0
    init_scale: float = 0.02
    bias_update_rate: float = 1e-3
    dtype: str = "bfloat16"
    expert_backend: str = "dense"
    seed: int = 0
    long_examples: str = "error"
    skip_bad_lines: bool = False
    log_every: int = 20
    evaluate_every: int = 200
    save_every: int = 500

    def __post_init__(self):
        for field in dataclasses.fields(self):
            kind, value = field.type, getattr(self, field.name)
            if kind == "float" and type(value) is int:
                object.__setattr__(self, field.name, value := float(value))
            good = {"int": int, "float": float, "str": str, "bool": bool}.get(kind, Mapping)
            if not isinstance(value, good) or (isinstance(value, bool) and kind != "bool"):
                raise UserError(f"recipe field {field.name} must be {kind}, found {value!r}")
            if kind == "float" and not 0 <= value < float("inf"):
                raise UserError(f"recipe field {field.name} is {value}: it must be a number from 0 up")
        for name in _INTEGERS:
            if getattr(self, name) < 1:
                raise UserError(f"recipe field {name} is {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.warmup_steps < self.steps:
            raise UserError(f"recipe field warmup_steps is {self.warmup_steps}: it must be from 0 to below steps")
        read_sources(self.sources)
        if self.long_examples not in LONG_EXAMPLES:
            raise UserError(
                f"recipe field long_examples is {self.long_examples!r}; it must be one of {', '.join(LONG_EXAMPLES)}"
            )


def load_recipe(path: str | os.PathLike, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply "name=value" overrides, values written as in TOML (strings also without quotes).

    Raises:
      UserError: if the file is missing or no TOML, or a field is missing, unknown or out of range.
    """
    try:
        fields = tomllib.loads(epath.Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML ({error})") from None
    for override in overrides:
        name, separator, value = override.partition("=")
        if not separator:
            raise UserError(f"--set {override}: expected name=value")
        fields[name.strip()] = _parse_value(value.strip())
    known = {field.name: field for field in dataclasses.fields(Recipe)}
    if unknown := sorted(set(fields) - set(known)):
        raise UserError(f"{path}: unknown recipe field {', '.join(unknown)}; fields are {', '.join(known)}")
    required = [name for name, field in known.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in fields]:
        raise UserError(f"{path}: missing recipe field {', '.join(missing)}")
    try:
        return Recipe(**fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _parse_value(text: str):
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
