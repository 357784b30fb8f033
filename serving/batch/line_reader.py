"""Lines of a file or a pipe, read no further than they are wanted and never longer than allowed.

Knows bytes only. Reads the descriptor itself, so that a pipe without data does not hold up answers
that are ready.
"""

import contextlib
import os
import select
import stat
from collections.abc import Iterator
from dataclasses import dataclass

MAX_LINE_BYTES = 32 << 20  # as the body of an HTTP request
_CHUNK_BYTES = 1 << 16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """content: without its newline; None when it was longer than allowed and is gone."""

    number: int  # from 1
    content: bytes | None


class LineReader:
    """Holds one line and 64 KiB at most."""

    def __init__(self, descriptor: int, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._descriptor = descriptor
        self._max_line_bytes = max_line_bytes
        self._held = bytearray()
        self._start = 0  # of the next line in what is held
        self._searched = 0  # no newline between the start and here
        self._number = 0
        self._is_skipping = False  # in the middle of a line that is too long
        self._is_drained = False

    @property
    def is_at_end(self) -> bool:
        return self._is_drained and self._start == len(self._held) and not self._is_skipping

    def read(self, wait_s: float) -> Line | None:
        """The next line; None at the end, or when none came within the time. Raises OSError."""
        while True:
            end = self._held.find(b"\n", self._searched)
            if end >= 0:
                return self._line(end, end + 1)
            self._searched = len(self._held)
            if self._searched - self._start > self._max_line_bytes:
                self._is_skipping = True
            if self._is_skipping:
                self._start = len(self._held)
            if self._is_drained:
                return None if self.is_at_end else self._line(len(self._held), len(self._held))
            if not select.select([self._descriptor], [], [], wait_s)[0]:
                return None
            self._fill()

    def look_for_end(self) -> None:
        """Notice the end now if nothing is left, without a wait. Raises OSError."""
        is_empty = self._start == len(self._held) and not self._is_drained
        if is_empty and select.select([self._descriptor], [], [], 0.0)[0]:
            self._fill()

    def _fill(self) -> None:
        del self._held[: self._start]
        self._searched -= self._start
        self._start = 0
        chunk = os.read(self._descriptor, _CHUNK_BYTES)
        self._held += chunk
        self._is_drained = not chunk

    def _line(self, end: int, after: int) -> Line:
        is_too_long = self._is_skipping or end - self._start > self._max_line_bytes
        content = None if is_too_long else bytes(self._held[self._start : end])
        self._start = self._searched = after
        self._is_skipping = False
        self._number += 1
        if self._number == 1 and content is not None:
            content = content.removeprefix(_BYTE_ORDER_MARK)
        return Line(self._number, content)


def is_regular(descriptor: int) -> bool:
    """A file that can be read twice."""
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


@contextlib.contextmanager
def read_ahead(descriptor: int) -> Iterator[LineReader]:
    """A reader of what is left of a regular file, whose position is put back afterwards."""
    at = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        yield LineReader(descriptor)
    finally:
        os.lseek(descriptor, at, os.SEEK_SET)


def count_lines(descriptor: int) -> int | None:
    """How many lines are left to read of a regular file, its position unchanged; None for others,
    and for one that cannot be read, which is left to the reader to say.

    Cost: one pass over the file, about a second per GiB.
    """
    if not is_regular(descriptor):
        return None
    at = os.lseek(descriptor, 0, os.SEEK_CUR)
    num_lines, last = 0, b"\n"
    try:
        while chunk := os.pread(descriptor, 1 << 20, at):
            num_lines += chunk.count(b"\n")
            last = chunk[-1:]
            at += len(chunk)
    except OSError:
        return None
    return num_lines + (last != b"\n")
