"""data."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from absl import flags

from ernie_jax.cli.command import Command, UsageError, require

if TYPE_CHECKING:
    import numpy as np

    from ernie_jax.train.data import Batch, Data
    from ernie_jax.train.recipe import Recipe
    from ernie_jax.train.sources import SourceFile


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "the recipe, a TOML file of configs/", flag_values=values)
    flags.DEFINE_multi_string("set", [], "name=value: override a recipe field", flag_values=values)
    flags.DEFINE_integer("examples", 3, "how many packed examples to show", flag_values=values)


def _data(values: flags.FlagValues) -> int:
    require(values, "config")
    if values.examples < 0:
        raise UsageError(f"--examples={values.examples}: it must be 0 or more")
    from ernie_jax.config import ModelConfig
    from ernie_jax.paths import storage_path
    from ernie_jax.train import load_recipe
    from ernie_jax.train.data import assemble, survey
    from ernie_jax.train.recipe import check_directory

    recipe = load_recipe(values.config, values["set"].value)
    check_directory(recipe)
    config = ModelConfig.from_file(storage_path(recipe.directory) / "config.json")
    files = []
    for file in survey(recipe, config):
        print("\n".join(_describe(file)))
        files.append(file)
    data = assemble(files, recipe)
    print("\n" + "\n".join(_describe_epoch(data, files, recipe)))
    for text in itertools.islice(_examples(data, files, recipe), values.examples):
        print(f"\n{text}")
    return int(any(file.bad for file in files))


def _describe(file: SourceFile) -> Iterator[str]:
    """Say what is in a file, and line by line what is wrong with it."""
    kind = "pair" if file.is_pairs else "example"
    longest = max((int(side.lengths.max(initial=0)) for side in file.sides), default=0)
    yield (
        f"{file.path}: {file.form}, {_count(file.lines, file.unit)}, {_count(len(file.numbers), kind)}, "
        f"{file.tokens():,} tokens, {file.learnt():,} of them learnt, the longest {longest:,}"
    )
    if file.bad:
        yield f"  {_count(len(file.bad), f'bad {file.unit}')}:"
    for number, reason in file.bad:
        yield f"  {file.unit} {number}: {reason}"
    if file.truncated:
        yield f"  {_count(file.truncated, kind)} longer than a row: the end is cut off"
    if file.skipped:
        yield f"  {_count(file.skipped, kind)} longer than a row: left out"
    for field, count in file.unused.items():
        yield f"  field {field} is not used (in {_count(count, file.unit)})"


def _describe_epoch(data: Data, files: Sequence[SourceFile], recipe: Recipe) -> Iterator[str]:
    """Give the sources' shares of an epoch, and how full its rows are."""
    files = [file for file in files if file.split == "train"]
    shown = [file.source.times * file.tokens() for file in files]
    width = max(len(file.source.name) for file in files)
    yield f"{'an epoch':<{max(width, 8)}}{'times':>8}{'tokens':>16}{'share':>9}"
    for file, tokens in zip(files, shown, strict=True):
        share = tokens / sum(shown)
        yield f"{file.source.name:<{max(width, 8)}}{file.source.times:>8g}{tokens:>16,.0f}{share:>9.1%}"
    training = data.training
    yield (
        f"packed into rows of {recipe.sequence_length:,} tokens, which are {training.efficiency():.2%} full: "
        f"{_count(training.steps(1), 'step')} of {_count(recipe.batch_size, 'row')}; the recipe ends in epoch "
        f"{training.epoch(recipe.steps - 1) + 1:,}, after {_count(recipe.steps, 'step')}"
    )


def _examples(data: Data, files: Sequence[SourceFile], recipe: Recipe) -> Iterator[str]:
    """Give what the batches hold, example by example, with what is learnt marked."""
    files = [file for file in files if file.split == "train"]
    show = _shower(recipe)
    for step in range(recipe.steps):
        batch = data.training.batch(step)
        sides = {"chosen": batch.chosen, "rejected": batch.rejected} if files[0].is_pairs else {"": batch}
        for row, contents in enumerate(data.training.contents(step)):
            for segment, (part, index) in enumerate(contents):
                file = files[part]
                where = f"{file.source.name}, {file.unit} {file.numbers[index]}"
                yield "\n".join(
                    f"step {step}, row {row}, segment {segment}: {where}{side and f', {side}'}: {text}"
                    for side, text in ((side, show(rows, row, segment)) for side, rows in sides.items())
                )


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' if number != 1 else ''}"


def _shower(recipe: Recipe) -> Callable[[Batch, int, int], str]:
    """Return what writes a segment of a batch as text, or as token ids where the model has no tokenizer."""
    from ernie_jax.paths import storage_path
    from ernie_jax.text import Tokenizer
    from ernie_jax.train.losses import IGNORED

    model = storage_path(recipe.directory)
    named = any((model / name).exists() for name in ("tokenizer.model", "tokenizer.json"))
    tokenizer = Tokenizer.load(model) if named else None
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    begin, end = ("\x1b[32m", "\x1b[0m") if colours else ("[[", "]]")

    def write(tokens: np.ndarray) -> str:
        ids = tokens.tolist()
        return tokenizer.decode(ids, skip_special=False) if tokenizer else " ".join(map(str, ids)) + " "

    def show(batch: Batch, row: int, segment: int) -> str:
        shown = batch.segments[row] == segment
        tokens = batch.tokens[row][shown]
        learnt = [False, *(batch.targets[row][shown][:-1] != IGNORED)]
        parts = [f"{len(tokens):,} tokens, {sum(learnt):,} learnt\n"]
        for mark, group in itertools.groupby(range(len(tokens)), key=learnt.__getitem__):
            text = write(tokens[list(group)])
            parts.append(f"{begin}{text}{end}" if mark else text)
        return "".join(parts)

    return show


DATA = Command(
    "data",
    "Show what a recipe trains on: what is in its files and every line that can't be learnt from, the sources' shares, "
    "how full the packed rows are, and a few examples as the model sees them. What is learnt is green on a terminal, "
    "elsewhere or with NO_COLOR set it stands in [[ ]]. Exits with 1 if a line is bad.",
    (
        "main.py data --config=configs/sft_embedded.toml",
        "main.py data --config=configs/sft_embedded.toml --set=sequence_length=512 --examples=10",
    ),
    _define,
    _data,
)
