"""Server-sent events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# What ends a stream of chat or completions.
DONE = b"data: [DONE]\n\n"


def plain_event(data: Mapping[str, Any]) -> bytes:
    """Return an event of chat or completions."""
    return b"data: " + _json(data) + b"\n\n"


def named_event(data: Mapping[str, Any]) -> bytes:
    """Return an event of /v1/responses, which bears its type as a name."""
    return b"event: " + data["type"].encode() + b"\n" + plain_event(data)


def _json(data: Mapping[str, Any]) -> bytes:
    # Text may have half of a surrogate pair, from an escape in a request that is echoed: then all is escaped.
    try:
        return _encode(data).encode()
    except UnicodeEncodeError:
        return json.dumps(data, separators=(",", ":")).encode()


# json.dumps would make an encoder every time, which takes longer than a token's event.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
