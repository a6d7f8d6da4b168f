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
        return UserError(f"line {number}: not valid JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # an endless number, endless brackets
        return UserError(f"line {number}: not valid JSON ({error})")
    return value if isinstance(value, dict) else UserError(f"line {number}: not a JSON object")


class OrderedWriter:
    """Write one JSON line per input line, in order, as results come in any order.

    Lines go to a partial file beside `path`, which takes its place when the context is left without an exception. The
    same work (`fingerprint`) started again goes on after the lines that are already there.

    Attributes:
      done: lines found from an earlier, interrupted run.
      errors: how many lines hold an error, those included.
    """

    def __init__(self, path: str, fingerprint: Sequence[Any]):
        digest = hashlib.sha256(json.dumps(fingerprint, default=str).encode()).hexdigest()[:8]
        self._path = pathlib.Path(path)
        self._partial = self._path.with_name(f"{self._path.name}.{digest}.partial")
        try:
            self._file = self._partial.open("a+b")
        except OSError as error:
            raise UserError(f"--output={path}: {error.strerror}") from None
        self._file.seek(0)
        whole, _, _ = self._file.read().rpartition(b"\n")
        self._file.truncate(len(whole) + bool(whole))
        found = list(self.lines())
        self.done, self.errors = len(found), sum("error" in record for record in found)
        self._next = self.done
        self._waiting: dict[int, bytes] = {}

    def write(self, index: int, record: Mapping[str, Any]) -> None:
        """Take the result of input line `index`, from 0."""
        self.errors += "error" in record
        line = json.dumps(record, ensure_ascii=False) + "\n"
        # An error may quote half of a surrogate pair: it goes out as the JSON escape that it came in as.
        self._waiting[index] = line.encode(errors="backslashreplace")
        while self._next in self._waiting:
            self._file.write(self._waiting.pop(self._next))
            self._file.flush()
            self._next += 1

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield what was written so far."""
        self._file.seek(0)
        yield from map(json.loads, self._file)

    def __enter__(self) -> OrderedWriter:
        return self

    def __exit__(self, exception: type | None, *_) -> None:
        self._file.close()
        if exception is None:
            os.replace(self._partial, self._path)
        elif not self._next:
            self._partial.unlink()
