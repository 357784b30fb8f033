"""What a supervisor shows: lines on stderr, and how far a start is where that is a terminal."""

import sys
from typing import TextIO


class Display:
    """Writes whole lines; progress is one line that is written over."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._has_progress = False

    def line(self, text: str) -> None:
        self._clear()
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def progress(self, what: str, done: int, total: int) -> None:
        """`done` of `total`, of what a start does; on a terminal only."""
        if not self._is_terminal:
            return
        self._clear()
        self._has_progress = done < total
        if self._has_progress:
            self._stream.write(f"{what}: {done} of {total}")
            self._stream.flush()

    def _clear(self) -> None:
        if self._has_progress:
            self._stream.write("\r\x1b[K")
            self._has_progress = False
