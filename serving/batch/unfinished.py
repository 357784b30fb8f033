"""The lines of the input that are left to do, each with its claim.

When the output holds results, nothing is given out before the input was seen to have their lines:
a run that is refused has written nothing into another input's output. A file is read twice for
that, up to the last of those lines; a pipe's lines are held.
"""

from collections import deque
from dataclasses import dataclass

from ...engine.errors import ConfigError
from .finished import Claim, Finished
from .line_reader import Line, LineReader, is_regular, read_ahead
from .progress import Progress
from .read_line import ReadLine, read_line

_MAX_HELD_BYTES = 64 << 20
_HELD_BYTES_PER_LINE = 1 << 10  # of objects, beside its content


@dataclass(frozen=True)
class UnfinishedLine:
    """A line that has no result yet."""

    read: ReadLine
    claim: Claim


class UnfinishedLines:
    """`read` moves on by one line of the input, `take` gives the next line to do."""

    def __init__(self, descriptor: int, finished: Finished, progress: Progress) -> None:
        self._descriptor = descriptor
        self._reader = LineReader(descriptor)
        self._finished = finished
        self._progress = progress
        self._held: deque[UnfinishedLine] = deque()
        self._num_held_bytes = 0
        self._is_checked = finished.num_unmet == 0

    @property
    def is_at_end(self) -> bool:
        return self._reader.is_at_end and not self._held

    def check_file(self) -> None:
        """Before anything else. Raises ConfigError when the results are not of this input, and
        OSError. Does nothing for a pipe.
        """
        if self._is_checked or not is_regular(self._descriptor):
            return
        with read_ahead(self._descriptor) as reader:
            while self._finished.num_unmet and not reader.is_at_end:
                line = reader.read(0.0)
                if line is not None and not _is_blank(line):
                    self._finished.claim(read_line(line).id, line.number)
        self._finished.rewind()
        self._is_checked = True

    def read(self, wait_s: float) -> bool:
        """False when no line came within the time. Raises ConfigError and OSError."""
        if self._held and self._is_checked:
            return True  # what is held goes first
        line = self._reader.read(wait_s)
        if line is None:
            return False
        if _is_blank(line):
            self._progress.blank()
            return True
        read = read_line(line)
        claim = self._finished.claim(read.id, line.number)
        if claim.is_finished:
            self._progress.skip()
        else:
            self._held.append(UnfinishedLine(read, claim))
            self._bound_held(len(line.content or b""))
        return True

    def take(self) -> UnfinishedLine | None:
        """None when there is none so far, or while results wait for their lines."""
        if self._finished.num_unmet == 0 or self._reader.is_at_end:
            self._is_checked = True
        return self._held.popleft() if self._held and self._is_checked else None

    def look_for_end(self) -> None:
        """Notice the end of the input now if nothing is left of it. Raises OSError."""
        self._reader.look_for_end()

    def _bound_held(self, num_bytes: int) -> None:
        if self._is_checked:
            return
        self._num_held_bytes += num_bytes + _HELD_BYTES_PER_LINE
        if self._num_held_bytes > _MAX_HELD_BYTES:
            raise ConfigError(
                f"more than {_MAX_HELD_BYTES >> 20} MiB of lines came without those that the "
                "output has results of, and a pipe's lines are held until then; give the input as "
                "a file, or another --output"
            )


def _is_blank(line: Line) -> bool:
    return line.content is not None and not line.content.strip()
