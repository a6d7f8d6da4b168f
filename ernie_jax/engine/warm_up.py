"""Programs compiled before anybody needs them, several at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import jax

_MOST_AT_ONCE = 16  # a large program takes some GB of the host's memory to compile


def compile_all(programs: Iterable[jax.stages.Lowered], compiled: Callable[[], None]) -> list[jax.stages.Lowered]:
    """Compile programs while the next ones are made: tracing is Python and takes turns, XLA is not and does not.

    A jitted function finds what was compiled here as long as the returned programs are kept.

    Args:
      compiled: called after each, in this thread.
    """
    made: list[jax.stages.Lowered] = []
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_AT_ONCE), "compiler") as pool:
        pending: set[Future] = set()
        try:
            for program in programs:
                made.append(program)
                pending.add(pool.submit(program.compile))
                pending = _collect(pending, compiled, timeout=0)
            while pending:
                pending = _collect(pending, compiled, timeout=None)
        finally:
            pool.shutdown(cancel_futures=True)
    return made


def _collect(pending: set[Future], compiled: Callable[[], None], timeout: float | None) -> set[Future]:
    done, left = wait(pending, timeout, FIRST_COMPLETED)
    for future in done:
        future.result()
        compiled()
    return left
