"""Starts the supervisor of supervise.py and watches what it starts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

WAIT_S = 60.0


class Supervised:
    """A supervisor process; leaving the `with` kills what is left of it."""

    def __init__(self, folder: Path, *, stderr_fd: int | None = None, **what: Any) -> None:
        """stderr_fd: instead of the file that `text` reads."""
        self.said = folder / "said"
        self.runtime = Path(tempfile.mkdtemp())  # pytest's folders are too long for sockets
        with self.said.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / "supervise.py"), json.dumps(what)],
                stderr=stderr if stderr_fd is None else stderr_fd,
                env=os.environ | {"XDG_RUNTIME_DIR": str(self.runtime)},
            )

    def __enter__(self) -> "Supervised":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: object, __: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        shutil.rmtree(self.runtime)
        if kind is not None:
            print(self.said.read_text(), file=sys.stderr)

    @property
    def text(self) -> str:
        """What it has said; how long something took is not a test's to know."""
        return re.sub(r"(ready (?:in|again after)) \d+\.\d s", r"\1 0.0 s", self.said.read_text())

    def until_said(self, part: str, count: int = 1) -> None:
        wait_until(lambda: self.text.count(part) >= count or self.process.poll() is not None)
        assert self.text.count(part) >= count, self.text

    def wait(self, timeout_s: float = WAIT_S) -> int:
        """The exit code."""
        return self.process.wait(timeout_s)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def children(self) -> list[int]:
        """Ids of the processes that it has started and that are there."""
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in task.read_text().split()]


def wait_until(is_so: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether the process is there and has not ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def fill(pipe_fd: int) -> None:
    """Until the next write to it would wait."""
    os.set_blocking(pipe_fd, False)
    with suppress(BlockingIOError):
        while True:
            os.write(pipe_fd, b"x")
    os.set_blocking(pipe_fd, True)
