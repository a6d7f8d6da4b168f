"""Which backends a step was compiled with: noted while it is traced, so no rule of choosing is written twice."""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator

from ernie_jax import ops

_SUFFIX = "_BACKENDS"
_TABLES = {
    name.removesuffix(_SUFFIX).lower(): getattr(ops, name)
    for name in sorted(ops.__all__)
    if name.endswith(_SUFFIX) and isinstance(getattr(ops, name), dict)
}


class TracedOps:
    """Note, while a program is traced under `noting`, each op's backend by the number of tokens it is given."""

    def __init__(self):
        self._seen: dict[str, dict[int, set[str]]] = {
            op: collections.defaultdict(set) for op, table in _TABLES.items() if all(map(callable, table.values()))
        }

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Note what is traced in the block; a program that was compiled before is not traced again."""
        before = {op: dict(_TABLES[op]) for op in self._seen}
        try:
            for op, table in before.items():
                _TABLES[op].update({name: self._noted(op, name, backend) for name, backend in table.items()})
            yield
        finally:
            for op, table in before.items():
                _TABLES[op].update(table)

    def describe(self, tokens: int) -> str:
        """Name the backends of a step of so many tokens; where none was traced, those of all steps."""
        words = []
        for op, seen in self._seen.items():
            names = seen.get(tokens) or set().union(*seen.values())
            if names:
                words.append(f"{op}: {'+'.join(sorted(names))}")
        return " · ".join(words)

    def _noted(self, op: str, name: str, backend: Callable) -> Callable:
        @functools.wraps(backend)
        def noted(*args, **options):
            tokens = next(len(arg) for arg in args if hasattr(arg, "shape"))
            self._seen[op][tokens].add(name)
            return backend(*args, **options)

        return noted
