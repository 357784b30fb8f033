"""Ctrl-C and SIGTERM, noted instead of raised: a run ends between two lines, not inside one."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | None
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """In force inside its `with`. The second signal does what it would have done without us."""

    def __init__(self) -> None:
        self.signal: int | None = None  # the one that came
        self._raises = False
        self._before: dict[int, Handler] = {}

    @property
    def exit_code(self) -> int:
        """As shells have it."""
        assert self.signal is not None
        return 128 + self.signal

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """For a long call in which nothing can be torn: a signal raises KeyboardInterrupt."""
        self._raises = True
        try:
            if self.signal is not None:  # it came just before
                raise KeyboardInterrupt
            yield
        finally:
            self._raises = False

    def __enter__(self) -> "Interrupts":
        # Python gives signals to the main thread only, and lets no other set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # A shell's background job ignores Ctrl-C, and goes on doing so.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self._restore()
        if self._raises:
            raise KeyboardInterrupt

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
