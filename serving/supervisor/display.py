"""What a supervisor shows, on stderr: lines, and on a terminal how far a start is.

Knows no processes. Nothing here raises or waits, whatever becomes of stderr: writing has a thread
of its own, and what it cannot get rid of is dropped.
"""

import os
import queue
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress

_BAR_COLUMNS = 12
_ERASE, _BOLD, _PLAIN = "\r\x1b[K", "\x1b[1m", "\x1b[0m"
# Whose progress is in bytes; the others are counts.
_IN_BYTES = frozenset({"weights"})
_MAX_PIECES = 1000
_CLOSE_S = 1.0


class Display:
    """Writes whole lines; on a terminal the last line is a bar for each thing in progress."""

    def __init__(self, fd: int | None = None, environment: Mapping[str, str] = os.environ) -> None:
        """fd: stderr's if not given, and nothing is shown if it has none."""
        fd = _stderr() if fd is None else fd
        self._writer = _Writer(fd) if fd is not None else None
        self._fd = fd
        self._is_terminal = fd is not None and os.isatty(fd) and environment.get("TERM") != "dumb"
        self._has_colours = self._is_terminal and not environment.get("NO_COLOR")
        self._progress: dict[str, tuple[int, int]] = {}
        self._has_bars = False

    def line(self, text: str) -> None:
        self._show(f"{text}\n")

    def headline(self, text: str) -> None:
        """A line that is not to be missed."""
        self.line(f"{_BOLD}{text}{_PLAIN}" if self._has_colours else text)

    def progress(self, what: str, done: int, total: int) -> None:
        """`done` of `total`, of what a start does; on a terminal only."""
        if not self._is_terminal:
            return
        self._progress[what] = (done, total)
        if all(done >= total for done, total in self._progress.values()):
            self._progress.clear()
        self._show()

    def drop_progress(self) -> None:
        """Nothing is in progress any more."""
        self._progress.clear()
        self._show()

    def close(self) -> None:
        """Nothing is shown after this; what was is given a moment to be written."""
        self.drop_progress()
        if self._writer is not None:
            self._writer.close()

    def _show(self, line: str = "") -> None:
        bars = "   ".join(_bar(what, *counts) for what, counts in self._progress.items())
        erase = _ERASE if self._has_bars else ""
        self._has_bars = bars != ""
        # Cut: a line that the terminal wraps cannot be written over.
        text = erase + line + bars[: _columns(self._fd) - 1]
        if text and self._writer is not None:
            self._writer.write(text.encode("utf-8", "backslashreplace"))


class _Writer:
    """Writes to a file descriptor, on a thread: a reader that has stopped reading (a pager, Ctrl-S)
    stops nobody else. Not through sys.stderr, whose lock a stuck thread would hold at exit.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pieces: queue.Queue[bytes | None] = queue.Queue(_MAX_PIECES)
        self._thread = threading.Thread(target=self._run, name="quire-display", daemon=True)
        self._thread.start()

    def write(self, piece: bytes | None) -> None:
        with suppress(queue.Full):
            self._pieces.put_nowait(piece)

    def close(self) -> None:
        self.write(None)
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        # The disk may be full, the reader or the terminal gone: then nothing more is written.
        with suppress(OSError):
            while (piece := self._pieces.get()) is not None:
                while piece:
                    piece = piece[os.write(self._fd, piece) :]


def _stderr() -> int | None:
    with suppress(OSError, ValueError):
        return sys.stderr.fileno() if sys.stderr is not None else None
    return None


def _columns(fd: int | None) -> int:
    with suppress(OSError):
        if fd is not None:
            return os.get_terminal_size(fd).columns or 80
    return 80


def _bar(what: str, done: int, total: int) -> str:
    """`programs ━━━━━━━━──── 12/20`"""
    filled = _BAR_COLUMNS * done // total if 0 <= done < total else _BAR_COLUMNS
    bar = "━" * filled + "─" * (_BAR_COLUMNS - filled)
    return f"{what} {bar} {_amount(done, total, is_bytes=what in _IN_BYTES)}"


def _amount(done: int, total: int, *, is_bytes: bool) -> str:
    if not is_bytes:
        return f"{done}/{total}"
    unit, size = ("GiB", 1 << 30) if total >= 1 << 30 else ("MiB", 1 << 20)
    decimals = 0 if total >= 10 * size else 1
    whole = f"{total / size:.{decimals}f} {unit}"
    return whole if done >= total else f"{done / size:.{decimals}f}/{whole}"
