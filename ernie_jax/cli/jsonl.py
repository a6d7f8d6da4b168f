"""JSON lines in and out, in order, one bad line never spoiling the others."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ernie_jax.errors import UserError


def read_objects(path: str) -> list[dict[str, Any] | UserError]:
    """Read a JSONL file: an object per line, or the error that names the line. Blank lines are errors too.

    Raises:
      UserError: if the file cannot be read.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--input={path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--input={path}: not UTF-8 at byte {error.start}") from None
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [_parse(number, line) for number, line in enumerate(lines, 1)]


def _parse(number: int, line: str) -> dict[str, Any] | UserError:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return UserError(f"line {number}: not valid JSON ({error})")
    return value if isinstance(value, dict) else UserError(f"line {number}: not a JSON object")


class OrderedWriter:
    """Write one JSON line per input line, in order, as results come in any order.

    Lines go to a partial file beside `path`, which takes its place at the end. The same work (`fingerprint`) started
    again goes on after the lines that are already there.

    Attributes:
      done: lines found from an earlier, interrupted run.
      errors: how many lines hold an error, those included.
    """

    def __init__(self, path: str, fingerprint: Sequence[Any]):
        digest = hashlib.sha256(json.dumps(fingerprint, default=str).encode()).hexdigest()[:8]
        self._path = pathlib.Path(path)
        self._partial = self._path.with_name(f"{self._path.name}.{digest}.partial")
        lines = self._whole_lines()
        self.done, self.errors = len(lines), sum("error" in json.loads(line) for line in lines)
        self._next = self.done
        self._waiting: dict[int, str] = {}
        try:
            self._partial.write_text("".join(lines), encoding="utf-8")
            self._file = self._partial.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output={path}: {error.strerror}") from None

    def _whole_lines(self) -> list[str]:
        if not self._partial.exists():
            return []
        return [line for line in self._partial.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")]

    def write(self, index: int, record: Mapping[str, Any]) -> None:
        """Take the result of input line `index`, from 0."""
        self.errors += "error" in record
        self._waiting[index] = json.dumps(record, ensure_ascii=False) + "\n"
        while self._next in self._waiting:
            self._file.write(self._waiting.pop(self._next))
            self._file.flush()
            self._next += 1

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield what was written so far."""
        with self._partial.open(encoding="utf-8") as file:
            yield from map(json.loads, file)

    def finish(self) -> None:
        """Put the file in its place."""
        self._file.close()
        os.replace(self._partial, self._path)
