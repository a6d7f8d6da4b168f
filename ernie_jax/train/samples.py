"""Samples of what a model in training says, to be read by people."""

from __future__ import annotations

import json

import numpy as np
from etils import epath

from ernie_jax import distributed
from ernie_jax.errors import UserError
from ernie_jax.paths import storage_path
from ernie_jax.text import Tokenizer
from ernie_jax.train.recipe import Recipe
from ernie_jax.train.trainer import Trainer, TrainState


class Samples:
    """Continue the recipe's prompts, and write samples.jsonl.

    A resumed run drops the samples after the step it resumes from.

    Raises:
      UserError: if a prompt and its continuation are longer than a row, or there is no tokenizer.
    """

    def __init__(self, recipe: Recipe, trainer: Trainer, output: epath.Path, resumed_step: int):
        directory = storage_path(recipe.directory)
        if not any((directory / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
            raise UserError(f"{directory}: has no tokenizer, which the recipe field sample_prompts needs")
        self._recipe, self._trainer, self._file = recipe, trainer, output / "samples.jsonl"
        self._tokenizer = Tokenizer.load(directory)
        self._prompts = [self._tokenizer.encode(prompt) for prompt in recipe.sample_prompts]
        self._longest = max(map(len, self._prompts)) + recipe.sample_tokens
        if self._longest > recipe.sequence_length:
            raise UserError(
                f"recipe field sample_prompts: a prompt and sample_tokens make {self._longest} tokens, more than "
                f"sequence_length, {recipe.sequence_length}"
            )
        self._lines = []
        if resumed_step and distributed.is_primary() and self._file.exists():
            lines = self._file.read_text().splitlines()
            self._lines = [line for line in lines if json.loads(line)["step"] <= resumed_step]

    def write(self, step: int, state: TrainState) -> list[str]:
        """Continue each prompt greedily; returns the continuations."""
        rows = np.zeros((len(self._prompts), self._longest), np.int32)
        for row, prompt in zip(rows, self._prompts, strict=True):
            row[: len(prompt)] = prompt
        lengths = np.array([len(prompt) for prompt in self._prompts], np.int32)
        rows = np.asarray(self._trainer.extend(state, rows, lengths, self._tokenizer.vocab_size))
        stops, texts = self._tokenizer.stop_ids(self._trainer.config.eos_token_id), []
        for row, prompt in zip(rows, self._prompts, strict=True):
            new = row[len(prompt) : len(prompt) + self._recipe.sample_tokens].tolist()
            end = next((index for index, token in enumerate(new) if token in stops), len(new))
            texts.append(self._tokenizer.decode(new[:end]))
        for prompt, text in zip(self._recipe.sample_prompts, texts, strict=True):
            self._lines.append(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False))
        if distributed.is_primary():
            self._file.write_text("\n".join(self._lines) + "\n")
        return texts
