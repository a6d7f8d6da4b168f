"""Drive an engine for a measurement: greedy runs over pages in no order. Only this module looks inside an Engine."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np

from ernie_jax.engine import Engine, SamplingParams, shapes

_FIRST_ID = 3  # after padding, start and end
clock = time.perf_counter


def draw_lengths(rng: np.random.Generator, batch: int, tokens: int, spread: float) -> list[int]:
    """Draw lengths of prompts, even between (1 - spread) and (1 + spread) times `tokens`."""
    low, high = round(tokens * (1 - spread)), round(tokens * (1 + spread))
    return rng.integers(max(1, low), max(1, high), batch, endpoint=True).tolist()


def random_prompts(engine: Engine, rng: np.random.Generator, lengths: Iterable[int]) -> list[list[int]]:
    """Draw prompts of random tokens, all different."""
    return [rng.integers(_FIRST_ID, engine.valid_vocab, length).tolist() for length in lengths]


def greedy(tokens: int) -> SamplingParams:
    """Return the settings of a run of exactly so many new tokens."""
    return SamplingParams(max_new_tokens=tokens, temperature=0.0, ignore_eos=True)


def run(engine: Engine, prompts: Sequence[Sequence[int]], new: int) -> tuple[float, list[list[int]]]:
    """Continue prompts greedily; returns the seconds from the first submit to the last token, and the new tokens."""
    start = clock()
    outputs = {engine.submit(prompt, greedy(new)): [] for prompt in prompts}
    while engine.has_work:
        for event in engine.step():
            outputs[event.request].append(event.token)
    return clock() - start, list(outputs.values())


def shuffle_pages(engine: Engine, rng: np.random.Generator) -> None:
    """Put the free pages of an idle engine in random order, as hours of serving do."""
    for pool in engine._pools:
        pool.forget()
        rng.shuffle(pool.free)


def start_decoding(engine: Engine, prompts: Sequence[Sequence[int]], new: int) -> None:
    """Submit prompts and compute them, so that the steps that follow are decode steps alone."""
    for prompt in prompts:
        engine.submit(prompt, greedy(new))
    scheduler = engine._scheduler
    while scheduler.waiting or any(task.computed < task.target for task in scheduler.running):
        engine.step()


def settle(engine: Engine) -> None:
    """Wait until the devices have done all that was dispatched."""
    engine._devices.settle()


def needed_tokens(engine: Engine, prompt: int, new: int) -> int:
    """Count the cache tokens that a sequence reserves: whole pages."""
    page = engine.options.page_size
    return -(-(prompt + new) // page) * page


def decode_tokens(engine: Engine, batch: int) -> int:
    """Return the static number of tokens in a decode step of `batch` sequences."""
    return shapes.decode_rows(batch, engine.options.max_sequences)


def prefill_tokens(engine: Engine, total: int) -> int:
    """Return the static number of tokens in a step that takes as much as it may of `total` prompt tokens."""
    chunk = engine.options.prefill_chunk
    return shapes.prefill_tokens(min(total, chunk), chunk)
