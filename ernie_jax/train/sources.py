"""Sources: the files of a recipe, what is in them and what is wrong with them."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.paths import is_local, storage_path
from ernie_jax.text import check_vocabulary
from ernie_jax.train.documents import Documents, learnt_path, read_documents
from ernie_jax.train.formats import FORMATS
from ernie_jax.train.tokenised import BadLine, load_text, read_lines

LONG_EXAMPLES = ("error", "skip", "truncate")
NPY = "token ids"  # what the format of .npy files is called


@dataclasses.dataclass(frozen=True)
class Source:
    """A part of the training data.

    Attributes:
      name: what metrics call it.
      train, heldout: files, .npy or JSON lines; relative ones in the recipe's directory `data`. There need not be one
        that is held out.
      times: how often an epoch shows each of its examples. 0.25 shows a quarter of them, the next epoch another one.
      format: a name of FORMATS; None: by its fields.
    """

    name: str
    train: str
    heldout: str | None = None
    times: float = 1.0
    format: str | None = None


def read_sources(fields: Mapping[str, Any]) -> list[Source]:
    """Return the sources of a recipe's field `sources`.

    Raises:
      UserError: naming what is wrong.
    """
    if not fields:
        raise UserError("recipe field sources must name at least one source")
    return [_read_source(name, value) for name, value in fields.items()]


def _read_source(name: str, value: Any) -> Source:
    if not isinstance(value, Mapping):
        value = {"train": f"{name}.train.npy", "heldout": f"{name}.heldout.npy", "times": value}
    where = f"recipe field sources.{name}"
    known = [field.name for field in dataclasses.fields(Source)][1:]
    if unknown := sorted(set(value) - set(known)):
        raise UserError(f"{where} has no field {', '.join(unknown)}; fields are {', '.join(known)}")
    if "train" not in value:
        raise UserError(f"{where} needs field train, its file")
    for field in ("train", "heldout", "format"):
        if not isinstance(value.get(field, ""), str):
            raise UserError(f"{where}.{field} must be text, found {value[field]!r}")
    times = value.get("times", 1)
    if type(times) not in (int, float) or not 0 < times < float("inf"):
        raise UserError(f"{where}: its times must be a number above 0, found {times!r}")
    if value.get("format", next(iter(FORMATS))) not in FORMATS:
        raise UserError(f"{where}.format is {value['format']!r}; formats are {', '.join(FORMATS)}")
    return Source(name, **value)


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file of a source, as a recipe takes it.

    Attributes:
      split: "train" or "heldout".
      form: name of its format.
      lines: how many lines, or documents of a .npy file.
      sides: its examples, bad and skipped ones left out; of a preference format the chosen and the rejected ones.
      numbers: [examples] the line that each is from, counted from 1; of a .npy file the document.
      bad: what can't be learnt from, by line.
      unused: fields that the format has no use for, and how many lines have them.
      skipped: examples left out as too long, or with nothing to learn in what truncation left.
      truncated: examples that lost their end.
      digest: SHA-256, of a .npy file that of the SHA-256 of it and of what is learnt of it.
    """

    source: Source
    split: str
    path: str
    form: str
    lines: int
    sides: tuple[Documents, ...]
    numbers: np.ndarray
    bad: list[BadLine]
    unused: dict[str, int]
    skipped: int
    truncated: int
    digest: str

    @property
    def unit(self) -> str:
        """What `numbers` counts."""
        return "document" if self.form == NPY else "line"

    @property
    def is_pairs(self) -> bool:
        return len(self.sides) > 1

    def tokens(self) -> int:
        """Count the tokens of its examples."""
        return int(sum(side.lengths.sum() for side in self.sides))

    def learnt(self) -> int:
        """Count those of them that are to be predicted."""
        return int(sum(side.learnt_counts().sum() for side in self.sides))


def read_files(
    sources: list[Source],
    data: str,
    model: str,
    config: ModelConfig,
    sequence_length: int,
    long_examples: str,
) -> Iterator[SourceFile]:
    """Read every file of some sources.

    Args:
      data: directory of relative paths.
      model: directory of the tokenizer and chat template that JSON lines are seen with.
      sequence_length: tokens of a row.
      long_examples: what becomes of an example that is longer: one of LONG_EXAMPLES. Texts that are learnt whole are
        never too long, as they may be cut.

    Raises:
      UserError: if a file can't be read at all; lines that are bad are listed.
    """
    for source in sources:
        for split, name in (("train", source.train), ("heldout", source.heldout)):
            if name is None:
                continue
            shown = os.path.join(data, os.path.expanduser(name)) if is_local(name) else name
            path = storage_path(shown)
            if not path.exists():
                raise UserError(f"{shown}: no such file")
            digest = _digest(path)
            if path.suffix == ".npy":
                sides = (read_documents(path, config.eos_token_id, config.vocab_size),)
                lines = len(sides[0].starts)
                form, numbers, bad, unused = NPY, np.arange(lines) + 1, [], {}
                if sides[0].learnt is not None:
                    digest = hashlib.sha256(f"{digest} {_digest(learnt_path(path))}".encode()).hexdigest()
            else:
                directory = storage_path(model)
                form, lines, sides, numbers, bad, unused = read_lines(path, source.format, directory, digest)
                check_vocabulary(load_text(directory, False)[0], config)
            found = SourceFile(source, split, shown, form, lines, sides, numbers, bad, unused, 0, 0, digest)
            yield _fit(found, sequence_length, long_examples)


def _digest(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fit(found: SourceFile, length: int, long_examples: str) -> SourceFile:
    """Do with the examples that are longer than a row what the recipe wants."""
    if not found.is_pairs and found.sides[0].learnt is None:
        return found
    sizes = np.max([side.lengths for side in found.sides], axis=0)
    long = np.flatnonzero(sizes > length)
    if not len(long):
        return found
    if long_examples == "truncate":
        sides = tuple(side._replace(lengths=np.minimum(side.lengths, length)) for side in found.sides)
        learns = np.min([side.learnt_counts() for side in sides], axis=0) > 0
        kept = learns | (sizes <= length)
        lost = int((~kept).sum())
        found = dataclasses.replace(found, sides=sides, truncated=len(long) - lost, skipped=lost)
        return _select(found, kept)
    kept = sizes <= length
    if long_examples == "skip":
        return _select(dataclasses.replace(found, skipped=len(long)), kept)
    longest: dict[int, int] = {}
    for index in long.tolist():
        number = int(found.numbers[index])
        longest[number] = max(int(sizes[index]), longest.get(number, 0))
    reasons = [
        BadLine(
            number,
            f"its example has {size:,} tokens, and rows have {length:,}: make sequence_length larger or set "
            'long_examples to "skip" or "truncate"',
        )
        for number, size in longest.items()
    ]
    return _select(dataclasses.replace(found, bad=sorted([*found.bad, *reasons])), kept)


def _select(found: SourceFile, kept: np.ndarray) -> SourceFile:
    sides = tuple(side._replace(starts=side.starts[kept], lengths=side.lengths[kept]) for side in found.sides)
    return dataclasses.replace(found, sides=sides, numbers=found.numbers[kept])
