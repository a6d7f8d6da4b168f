"""Page bookkeeping on the host: who uses a page of the cache, and what full pages hold.

A page is free, used by sequences, or idle: unused, but still known by its content. What is given out follows from the
calls alone, so that all processes of a run have the same pages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def extend_keys(keys: list[bytes], tokens: Sequence[int], page_size: int) -> None:
    """Append the keys of the full pages of `tokens`, which follow the pages of `keys`.

    A page's key is a hash of its tokens and the key before, so that equal keys mean equal prefixes.
    """
    content = memoryview(np.asarray(tokens, np.int32))
    for end in range(page_size, len(tokens) + 1, page_size):
        page = content[end - page_size : end]
        keys.append(hashlib.blake2b(page, digest_size=16, key=keys[-1] if keys else b"").digest())


class PagePool:
    """The pages of one data group, numbered 0..P-1 in it.

    Attributes:
      free: pages whose content nobody wants, taken from the end.
      sequences: how many sequences hold pages here.
    """

    def __init__(self, pages: int):
        self.free = list(range(pages - 1, -1, -1))
        self.sequences = 0
        self._users = [0] * pages
        self._keys: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}
        self._idle: dict[int, None] = {}  # in the order in which they became idle

    @property
    def size(self) -> int:
        return len(self._users)

    @property
    def idle(self) -> int:
        """How many pages are unused but known."""
        return len(self._idle)

    @property
    def available(self) -> int:
        """How many pages `take` can give."""
        return len(self.free) + len(self._idle)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Return the known pages of the longest prefix of a chain of keys; they may be idle."""
        found = []
        for key in keys:
            if (page := self._pages.get(key)) is None:
                break
            found.append(page)
        return found

    def count_idle(self, pages: Sequence[int]) -> int:
        """Count which of some pages are idle: sharing them takes from what is available."""
        return sum(page in self._idle for page in pages)

    def take(self, count: int) -> list[int]:
        """Give out pages of unknown content, of which `count` must be available; the longest idle are forgotten."""
        taken = []
        for _ in range(count):
            if not self.free:
                oldest = next(iter(self._idle))
                del self._idle[oldest]
                del self._pages[self._keys.pop(oldest)]
                self.free.append(oldest)
            page = self.free.pop()
            self._users[page] = 1
            taken.append(page)
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """Use known pages, which others may use too; none of the users writes to them."""
        for page in pages:
            self._users[page] += 1
            self._idle.pop(page, None)

    def register(self, page: int, key: bytes) -> None:
        """Make a full page known that somebody uses; if its content is known elsewhere, that page stays the one."""
        if key not in self._pages:
            self._pages[key] = page
            self._keys[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """Take back a user's pages, in the order of its tokens: of a chain the end is forgotten first."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._keys:
                self._idle[page] = None
            else:
                self.free.append(page)

    def forget(self) -> None:
        """Forget what idle pages hold."""
        for page in self._idle:
            del self._pages[self._keys.pop(page)]
        self.free.extend(self._idle)
        self._idle.clear()
