"""Results on their way to the output: as they finish, or in the order of their lines."""

from collections import deque
from collections.abc import Callable

from .result_line import Result

Write = Callable[[Result], None]


class AsFinished:
    """Every result at once."""

    num_held = 0

    def __init__(self, write: Write) -> None:
        self._write = write

    def expect(self, index: int) -> None:
        """A line will have a result."""

    def put(self, index: int, result: Result) -> None:
        self._write(result)


class InOrder:
    """A result once those of all lines before it are written; others are held."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._expected: deque[int] = deque()
        self._held: dict[int, Result] = {}

    @property
    def num_held(self) -> int:
        return len(self._held)

    def expect(self, index: int) -> None:
        """In the order of the lines."""
        self._expected.append(index)

    def put(self, index: int, result: Result) -> None:
        self._held[index] = result
        while self._expected and self._expected[0] in self._held:
            self._write(self._held.pop(self._expected.popleft()))
