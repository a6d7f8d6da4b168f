"""JSON lines in and out, in order, one bad line never spoiling the others.

Of several processes only process 0 reads and writes files; the others hear from it what it found there.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from ernie_jax import distributed
from ernie_jax.errors import UserError


def read_objects(path: str) -> list[dict[str, Any] | UserError]:
    """Read a JSONL file: an object per line, or the error that names the line. Blank lines are errors too.

    Raises:
      UserError: if the file cannot be read.
    """
    lines = read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [_parse(number, line) for number, line in enumerate(lines, 1)]


def read_text(path: str) -> str:
    """Read a text file.

    Raises:
      UserError: if the file cannot be read.
    """
    return distributed.broadcast(_read(path) if distributed.is_primary() else None)


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--input={path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--input={path}: not UTF-8 at byte {error.start}") from None


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
        self._file = self._open() if distributed.is_primary() else open(os.devnull, "r+b")  # noqa: SIM115
        found = list(self.lines())
        self.done, self.errors = distributed.broadcast([len(found), sum("error" in record for record in found)])
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

    def _open(self) -> BinaryIO:
        """Open the partial file, without the line that an interruption cut."""
        try:
            file = self._partial.open("a+b")
        except OSError as error:
            raise UserError(f"--output={self._path}: {error.strerror}") from None
        file.seek(0)
        whole, _, _ = file.read().rpartition(b"\n")
        file.truncate(len(whole) + bool(whole))
        return file

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield what was written so far; nothing except in process 0."""
        self._file.seek(0)
        yield from map(json.loads, self._file)

    def __enter__(self) -> OrderedWriter:
        return self

    def __exit__(self, exception: type | None, *_) -> None:
        self._file.close()
        if not distributed.is_primary():
            return
        if exception is None:
            os.replace(self._partial, self._path)
        elif not self._next:
            self._partial.unlink()
