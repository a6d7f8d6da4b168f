"""Recipe: everything that decides a training run, read from a TOML file."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from ernie_jax.errors import UserError
from ernie_jax.lora import TARGETS, LoRA
from ernie_jax.paths import storage_path
from ernie_jax.train.fields import check_fields
from ernie_jax.train.preference_options import PreferenceOptions
from ernie_jax.train.sources import LONG_EXAMPLES, read_sources

_POSITIVE = ("steps", "batch_size", "sequence_length", "accumulate", "log_every", "evaluate_every", "save_every")
_POSITIVE += ("keep_last", "sample_tokens")
_CHOICES = {
    "long_examples": LONG_EXAMPLES,
    "schedule": ("cosine", "wsd"),
    "decay": ("half_life", "1-sqrt"),
    "moment_dtype": ("float32", "bfloat16", "int8"),
    "remat": ("none", "products", "kernels", "attention", "layers"),
}
# Of a model that goes on learning the routers stay as they are, as in ERNIEKit.
_FROZEN_IN_CHECKPOINTS = ("*.router.*",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Describe one training run. Paths are local or gs://.

    Attributes:
      model: directory with config.json and the tokenizer's files, which are copied into the result; the run starts from
        random weights.
      checkpoint: instead of `model`, a converted checkpoint whose weights the run starts from.
      data: directory of the sources' files.
      sources: name -> the fields of a sources.Source; or only its `times`, of token ids in NAME.train.npy and
        NAME.heldout.npy.
      output: directory of the run: state/ to resume from, metrics.jsonl, curve.svg, samples.jsonl, and at the end
        checkpoint/ or adapter/.
      batch_size: rows of `sequence_length` tokens in a step.
      long_examples: what becomes of examples longer than a row, of which only a part is learnt.
      skip_bad_lines: leave out the lines of the data that can't be learnt from, instead of refusing to start.
      accumulate: in how many parts, one after the other, a step computes its gradient.
      learning_rate: at the end of a linear warm-up; from there the schedule leads to `final_learning_rate`.
      schedule: "cosine", or "wsd": constant up to the last `decay_steps`.
      decay: how wsd ends, "half_life" or "1-sqrt".
      decay_steps: of wsd; 0 is a tenth of all.
      moment_dtype: in which AdamW's moments are stored: float32, bfloat16 or int8 (moments.py).
      token_balanced: divide the gradient by all places of a batch instead of those that are learnt, so that a token
        weighs the same however few of a batch are learnt.
      frozen: names of parameters that stay as they are, with * for any letters; default: with a checkpoint the routers,
        else none.
      lora_rank: with a rank, adapters of it are trained and all else is frozen; 0 trains the weights themselves.
      lora_alpha: an adapter counts lora_alpha / lora_rank times.
      lora_rank_stabilised: lora_alpha / sqrt(lora_rank) times instead (rsLoRA).
      lora_plus: what the learning rate of the adapters' second matrices is multiplied by (LoRA+).
      lora_targets: which linear layers get adapters: attention, dense, shared, routed.
      bias_update_rate: step of the routers' correction bias towards equal use of the experts, unless it is frozen.
      router_balance_weight, router_z_weight, router_orthogonality_weight: of the routers' losses, each summed over the
        MoE layers, beside the loss of the tokens.
      router_orthogonality_rate: of a step of the routers' weights towards orthogonal rows, after the optimiser's.
      mtp_weight: of the mean loss of the depths of multi-token prediction; 0 leaves their weights as they are.
      preference: the fields of a PreferenceOptions, with which pairs of answers are learnt from; none: one answer each.
      log_every, evaluate_every, save_every: steps between rows of metrics.jsonl, between measures of the held-out loss,
        and between saves.
      keep_last: how many saves are kept.
      keep_every: those of multiples of so many steps are kept too; 0 keeps none.
      loss_spike: stop where a step's loss exceeds the mean of those before it by so many nats; 0 never stops.
      sample_prompts: texts that are continued greedily, by sample_tokens tokens, when the held-out loss is measured.
      remat: what a step computes again instead of keeping it: "none"; "products": all but matrix products; "kernels":
        all but what kernels of attention and experts keep; "attention": all but what those of attention keep; "layers":
        all but what goes from layer to layer.
      dtype: of the computation and of the result; master weights are float32.
      expert_backend: a name of ops.DIFFERENTIABLE_EXPERT_BACKENDS.
      attention_backend: a name of ops.PACKED_ATTENTION_BACKENDS; default: by the device.

    Raises:
      UserError: naming the field, if a value is out of range.
    """

    model: str = ""
    checkpoint: str = ""
    data: str
    sources: Mapping[str, Any]
    output: str
    steps: int
    batch_size: int
    sequence_length: int
    long_examples: str = "error"
    skip_bad_lines: bool = False
    accumulate: int = 1
    learning_rate: float
    final_learning_rate: float = 0.0
    warmup_steps: int = 0
    schedule: str = "cosine"
    decay: str = "half_life"
    decay_steps: int = 0
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    moment_dtype: str = "float32"
    gradient_clip: float = 1.0
    token_balanced: bool = False
    frozen: Sequence[str] | None = None
    lora_rank: int = 0
    lora_alpha: float = 32.0
    lora_rank_stabilised: bool = False
    lora_plus: float = 1.0
    lora_targets: Sequence[str] = TARGETS
    init_scale: float = 0.02
    bias_update_rate: float = 1e-3
    router_balance_weight: float = 0.0
    router_z_weight: float = 0.0
    router_orthogonality_weight: float = 0.0
    router_orthogonality_rate: float = 0.0
    mtp_weight: float = 0.0
    preference: Mapping[str, Any] | None = None
    remat: str = "none"
    dtype: str = "bfloat16"
    expert_backend: str = "dense"
    attention_backend: str = ""
    seed: int = 0
    log_every: int = 20
    evaluate_every: int = 200
    save_every: int = 500
    keep_last: int = 1
    keep_every: int = 0
    loss_spike: float = 5.0
    sample_prompts: Sequence[str] = ()
    sample_tokens: int = 64

    def __post_init__(self):
        check_fields(self, "recipe field ")
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise UserError(f"recipe field {name} is {getattr(self, name)}: it must be at least 1")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"recipe field {name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if bool(self.model) == bool(self.checkpoint):
            raise UserError(
                "give either the recipe field model, to start from random weights, or checkpoint, to start from those "
                "of a converted checkpoint"
            )
        if self.batch_size % self.accumulate:
            raise UserError(
                f"recipe field batch_size is {self.batch_size}: it must be a multiple of accumulate, {self.accumulate}"
            )
        if self.lora_rank:
            _ = self.lora  # which checks its fields
        self._check_preference()
        if not 0 <= self.warmup_steps < self.steps:
            raise UserError(f"recipe field warmup_steps is {self.warmup_steps}: it must be from 0 to below steps")
        read_sources(self.sources)
        if not 0 <= self.decay_steps <= self.steps - self.warmup_steps:
            raise UserError(
                f"recipe field decay_steps is {self.decay_steps}: it must be from 0 to steps less warmup_steps"
            )

    @property
    def lora(self) -> LoRA | None:
        """The adapters that are trained; None where the weights themselves are."""
        if not self.lora_rank:
            return None
        return LoRA(self.lora_rank, self.lora_alpha, self.lora_rank_stabilised, tuple(self.lora_targets))

    def _check_preference(self) -> None:
        if self.preference is None:
            return
        known = [field.name for field in dataclasses.fields(PreferenceOptions)]
        if unknown := sorted(set(self.preference) - set(known)):
            raise UserError(f"recipe field preference has no {', '.join(unknown)}; it has {', '.join(known)}")
        _ = self.preference_options  # which checks its fields
        if not self.checkpoint:
            raise UserError("recipe field preference starts from a model that answers: give checkpoint, not model")
        for name in ("mtp_weight", "token_balanced"):
            if getattr(self, name):
                raise UserError(f"recipe field {name} is for training on one answer each: leave it out with preference")

    @property
    def preference_options(self) -> PreferenceOptions | None:
        """What is learnt from pairs of answers; None where there are none."""
        return None if self.preference is None else PreferenceOptions(**self.preference)

    @property
    def directory(self) -> str:
        """The directory of the model's config and tokenizer."""
        return self.model or self.checkpoint

    def freezes(self, parameter: str) -> bool:
        """Tell whether a parameter stays as it is."""
        frozen = self.frozen
        if frozen is None:
            frozen = _FROZEN_IN_CHECKPOINTS if self.checkpoint else ()
        return any(fnmatch.fnmatchcase(parameter, pattern) for pattern in frozen)


def load_recipe(path: str | os.PathLike, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply "name=value" overrides, values written as in TOML (strings also without quotes).

    A name with dots, as in sources.chat.times, is of a field within a table.

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
        *tables, name = name.strip().split(".")
        table = fields
        for part in tables:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise UserError(f"--set {override}: {part} is no table")
        table[name] = _parse_value(value.strip())
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


def check_directory(recipe: Recipe) -> None:
    """Check that the recipe's model or checkpoint is there.

    Raises:
      UserError: naming the field, if it is not.
    """
    if storage_path(recipe.directory).exists():
        return
    field, advice = "model", "name a directory with config.json and the tokenizer's files"
    if recipe.checkpoint:
        field, advice = "checkpoint", f"make it first: main.py convert --source=... --target={recipe.checkpoint}"
    raise UserError(f"recipe field {field} is {recipe.directory}: no such directory; {advice}")


def _parse_value(text: str):
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
