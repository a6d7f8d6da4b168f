"""API keys: read from a file or the environment, kept as hashes, found in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
import pathlib
import re
from collections.abc import Mapping

from ernie_jax.errors import UserError

VARIABLE = "ERNIE_API_KEYS"
# What a client can send after "Bearer " whatever its HTTP library.
_KEY = re.compile(r"[!-~]+")
_COMMENT = re.compile(r"(?m)(^|(?<=\s))#.*")


class Keys:
    """Hold the hashes of keys and whose they are.

    Names may repeat: while one key of a name replaces another, both are good and share the name's limits. A key without
    a name is called by the first digits of its hash, so that it keeps its usage wherever its line moves.
    """

    def __init__(self) -> None:
        self._names: dict[bytes, str] = {}

    @classmethod
    def load(cls, path: str | None = None, environment: Mapping[str, str] = os.environ) -> Keys:
        """Read the file, if one is given, and ERNIE_API_KEYS, where commas separate as line ends do.

        Raises:
          UserError: naming the line at fault, never showing it; also if the file or the variable is there but holds no
            key, because access would be open to everybody.
        """
        keys = cls()
        if path is not None:
            try:
                text = pathlib.Path(path).read_text(encoding="utf-8-sig")
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from None
            except UnicodeDecodeError:
                raise UserError(f"{path}: not a text file in UTF-8") from None
            keys.add(text, path)
        if listed := environment.get(VARIABLE):
            keys.add(_COMMENT.sub("", listed).replace(",", "\n"), VARIABLE)
        return keys

    def add(self, text: str, source: str) -> None:
        """Take the keys of a text, one a line: `key` or `name key`, with comments from # on.

        Raises:
          UserError: as `load` does; `source` is the file's or the variable's name.
        """
        before = len(self._names)
        for number, line in enumerate(_COMMENT.sub("", text).splitlines(), 1):
            words = line.split()
            if not words:
                continue
            if len(words) > 2 or not _KEY.fullmatch(words[-1]):
                raise UserError(f"{source}, line {number}: write `key` or `name key`, the key in visible ASCII")
            digest = _digest(words[-1])
            if digest in self._names:
                raise UserError(f"{source}, line {number}: this key is there already")
            self._names[digest] = words[0] if len(words) == 2 else f"key-{digest.hex()[:8]}"
        if len(self._names) == before:
            raise UserError(f"{source}: no API key in it; without one everybody would have access")

    def find(self, key: str) -> str | None:
        """Return whose key it is, None if nobody's; takes the same time wherever it stands."""
        digest, found = _digest(key), None
        for known, name in self._names.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"Keys({len(self)})"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()
