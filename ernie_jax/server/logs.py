"""The server's log: one JSON object a line, without what users say."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from ernie_jax.server.protocol.generation import Usage


class Log:
    """Write events, from any thread.

    Args:
      stream: where to; None is stderr.
      log_prompts: whether prompts, and exceptions' messages, which may quote them, are part of it.
    """

    def __init__(self, stream: TextIO | None = None, log_prompts: bool = False):
        self._stream = stream or sys.stderr
        self._log_prompts = log_prompts
        self._lock = threading.Lock()

    def write(self, level: str, event: str, *, prompt: Any = None, **fields: Any) -> None:
        """Write a line: time, level and event, then the fields that are not None.

        Args:
          level: info, warning or error.
          prompt: text, messages or tokens, left out unless asked for.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        record = {"time": now.replace("+00:00", "Z"), "level": level, "event": event}
        record |= {name: value for name, value in fields.items() if value is not None}
        if self._log_prompts and prompt is not None:
            record["prompt"] = prompt
        line = json.dumps(record, default=str) + "\n"
        # No answer fails because nobody reads the log, or its stream is closed.
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._stream.write(line)
            self._stream.flush()

    def request(
        self,
        request_id: str,
        key: str | None,
        endpoint: str,
        status: int,
        seconds: float,
        usage: Usage | None = None,
        *,
        prompt: Any = None,
        **fields: Any,
    ) -> None:
        """Write that a request is over.

        Args:
          key: the name of the caller's key; None if nobody was let in.
          usage: its tokens; None if it came to none.
          prompt, fields: as for `write`.
        """
        level = "error" if status >= 500 else "warning" if status >= 400 else "info"
        tokens = usage and {"prompt": usage.prompt, "cached": usage.cached, "generated": usage.completion}
        about = {"request_id": request_id, "key": key, "endpoint": endpoint, "status": status}
        self.write(level, "request", prompt=prompt, **about, seconds=round(seconds, 6), tokens=tokens, **fields)

    def exception(self, event: str, error: BaseException, **fields: Any) -> None:
        """Write an error with the places that it came through."""
        frames = traceback.extract_tb(error.__traceback__)
        places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        message = str(error) if self._log_prompts else None
        self.write("error", event, error=type(error).__name__, message=message, places=places, **fields)

    def handler(self) -> logging.Handler:
        """Return a handler for the loggers of libraries, such as the HTTP server's."""
        return _Handler(self)


class _Handler(logging.Handler):
    def __init__(self, log: Log):
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        event = record.getMessage().strip()
        if record.exc_info and record.exc_info[1]:
            self._log.exception(event, record.exc_info[1], logger=record.name)
        else:
            self._log.write(record.levelname.lower(), event, logger=record.name)
