"""How far a run is, on stderr: a bar on a terminal, elsewhere a line now and then, a line at the
end.
"""

import sys
import time
from typing import Any

from ..say import say
from .result_line import Usage

_LINE_EVERY_S = 10.0


class Progress:
    """Counts lines: of a run, and of the results that were there before."""

    def __init__(self, num_lines: int | None) -> None:
        """num_lines: of the input, None when it cannot be known."""
        self.num_done = 0
        self.num_errors = 0
        self.num_skipped = 0
        self._total = num_lines
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._started_s = self._said_s = time.monotonic()
        self._said_tokens = 0
        self._bar: Any = None

    def start_clock(self) -> None:
        """The engine is ready: rates count from here."""
        self._started_s = self._said_s = time.monotonic()
        self._bar = _bar(self._total, self.num_skipped + self.num_done)

    def blank(self) -> None:
        """A line without anything on it asks for nothing."""
        if self._total is not None:
            self._total -= 1
            if self._bar is not None:
                self._bar.total = self._total

    def skip(self) -> None:
        """A line that an earlier run finished."""
        self.num_skipped += 1
        if self._bar is not None:
            self._bar.initial += 1  # no part of the rate
            self._bar.update()

    def finish(self, usage: Usage, *, is_error: bool) -> None:
        """A line whose result is written."""
        self.num_done += 1
        self.num_errors += is_error
        self._prompt_tokens += usage.prompt_tokens
        self._completion_tokens += usage.completion_tokens
        if self._bar is not None:
            self._bar.update()

    def tick(self, num_tokens: int) -> None:
        """Often. num_tokens: output tokens so far, those of unfinished answers among them."""
        elapsed_s = time.monotonic() - self._said_s
        if elapsed_s < (1.0 if self._bar is not None else _LINE_EVERY_S):
            return
        rate = (num_tokens - self._said_tokens) / elapsed_s
        self._said_s, self._said_tokens = time.monotonic(), num_tokens
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._errors()}{rate:.1f} tokens/s")
        else:
            say(self._line(rate))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def summary(self, num_earlier_errors: int) -> str:
        """The last line of a run. tokens/s are output tokens."""
        seconds = time.monotonic() - self._started_s
        return (
            f"{self.num_done} lines done, {self.num_errors} errors, {self.num_skipped} skipped "
            f"(already done, {num_earlier_errors} of them errors); {self._prompt_tokens} tokens "
            f"in, {self._completion_tokens} out, "
            f"{self._completion_tokens / max(seconds, 1e-9):.1f} tokens/s, {seconds:.1f} s"
        )

    def _line(self, rate: float) -> str:
        done = self.num_skipped + self.num_done
        if self._total is None:
            return f"{done} lines, {self._errors()}{rate:.1f} tokens/s"
        line = f"{done} of {self._total} lines, {self._errors()}{rate:.1f} tokens/s"
        if not self.num_done:
            return line
        seconds = time.monotonic() - self._started_s
        left_s = (self._total - done) * seconds / self.num_done
        return f"{line}, {_clock(left_s)} left"

    def _errors(self) -> str:
        return f"{self.num_errors} errors, " if self.num_errors else ""


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _bar(total: int | None, num_done: int) -> Any:
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=num_done, desc="lines", unit="line", smoothing=0)
