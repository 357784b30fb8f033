"""The log of a process on stderr: lines for people, or one JSON object a line.

What a client sends may stand in a message or in a field: it never starts a line of its own.
"""

import contextlib
import json
import logging
import math
import queue
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from logging.handlers import QueueHandler
from typing import Any

# What every record has; the rest came as `extra`.
_OWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}

# Of records that wait to be written.
_MAX_RECORDS = 10_000
# What a stderr that nobody reads gets at the end.
_CLOSE_S = 1.0


def configure_logs(level: str, format: str) -> Callable[[], None]:
    """Everything from `level` (debug, info, warning, error) on goes to stderr, as text or json.

    A thread writes it: a stderr that nobody reads stops no request, and what there is no more room
    for is dropped. Returns what writes the rest, for the end of the process.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if format == "json" else _TextFormatter())
    records: queue.Queue[logging.LogRecord | None] = queue.Queue(_MAX_RECORDS)
    logging.basicConfig(level=level.upper(), handlers=[_Enqueuing(records)], force=True)

    def write() -> None:
        while (record := records.get()) is not None:
            # A stderr that is closed raises in the handler's own handling of errors.
            with contextlib.suppress(Exception):
                handler.handle(record)

    writing = threading.Thread(target=write, name="quire-log", daemon=True)
    writing.start()

    def close() -> None:
        try:
            records.put(None, timeout=_CLOSE_S)
        except queue.Full:
            return
        writing.join(_CLOSE_S)

    return close


class _Enqueuing(QueueHandler):
    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """As it is: its text is made on the other thread."""
        record.message = record.getMessage()
        return record

    def handleError(self, record: logging.LogRecord) -> None:
        """There is no room."""


class _TextFormatter(logging.Formatter):
    """`2026-11-21 15:04:05.123 INFO gateway: message request_id=…`, in local time."""

    def format(self, record: logging.LogRecord) -> str:
        written = datetime.fromtimestamp(record.created)
        line = (
            f"{written.isoformat(' ', 'milliseconds')} {record.levelname} {_source(record)}: "
            f"{_on_one_line(record.getMessage())}"
        )
        for name, value in _extra(record).items():
            line += f" {name}={_quoted(str(value))}"
        # Indented, a line of an exception's message is none of the log.
        return "\n  ".join([line, *map(_on_one_line, _trace(record).splitlines())])


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        written = datetime.fromtimestamp(record.created, UTC)
        entry: dict[str, Any] = {
            "ts": written.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in _extra(record).items():
            is_json = not isinstance(value, float) or math.isfinite(value)
            entry.setdefault(name, value if is_json else str(value))
        if trace := _trace(record):
            entry["exception"] = trace
        return json.dumps(entry, default=str)


def _source(record: logging.LogRecord) -> str:
    """`gateway` for what is quire.serving.gateway's, else the library's name."""
    return record.name.removeprefix("quire.serving.").partition(".")[0]


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in record.__dict__.items() if name not in _OWN}


def _trace(record: logging.LogRecord) -> str:
    if not record.exc_info:
        return ""
    return logging.Formatter().formatException(record.exc_info)


def _quoted(text: str) -> str:
    """In quotes where the text could be read as more than one value."""
    line = _on_one_line(text)
    return line if line and not set(line) & set(' "=') else '"' + line.replace('"', '\\"') + '"'


def _on_one_line(text: str) -> str:
    """Newlines, terminal codes and what turns the direction of writing, written out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
