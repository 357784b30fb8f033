"""The output: its lock, the results it holds already, and one write for each new one.

A result counts when its whole line, newline included, was handed to the system. What a crash left
of a last line is cut off when the file is opened again.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import select
import stat
import sys
from collections.abc import Callable
from io import FileIO
from typing import NoReturn

from ...engine.errors import ConfigError, QuireError
from ..say import say
from .finished import Finished
from .result_line import HEAD, Result

_GO_ON = "run the same command again to go on"
_WAY_OUT = {
    errno.ENOSPC: "free space and ",
    errno.EDQUOT: "free space and ",
    errno.EFBIG: "raise the limit on file sizes and ",
}


_WAIT_S = 0.2  # how late an interrupt may be noticed while nobody reads the output


class BatchStopped(QuireError):
    """A run ended early. What is written stays, and the same command goes on from there.

    Of its own, beside the tree of engine/errors.py: it is this command's, never the library's, and
    neither the caller's mistake (a full disk is not) nor always the engine's.
    """


class ResultFile:
    """Open it with `open_results`. Results are written whole, in the order of the calls."""

    def __init__(self, name: str, stream: FileIO, *, is_kept: bool) -> None:
        """is_kept: a regular file, which can be read again; others are written only."""
        self.name = name
        self.finished = Finished(name)
        self.num_complete = 0
        self.num_errors = 0  # of the complete ones
        self.num_cut_bytes = 0  # of a torn line, when it was opened
        self._stream = stream
        self._is_kept = is_kept
        self._num_bytes = 0  # of the complete results, in a file that is kept
        self._num_synced = 0

    @property
    def descriptor(self) -> int:
        return self._stream.fileno()

    @property
    def go_on(self) -> str:
        """What a user does after a run that ended early."""
        return f"; {_GO_ON}" if self._is_kept else ""

    def append(self, result: Result, is_interrupted: Callable[[], bool]) -> None:
        """Raises BatchStopped when the line cannot be written; then nothing of it stays. A pipe
        that nobody reads is waited for until the interrupt; then raises KeyboardInterrupt.
        """
        line = memoryview(result.content + b"\n")
        try:
            while line:
                if not self._is_kept:
                    self._wait_for_room(is_interrupted)
                # No more than fits into a pipe that has room, so that the write does not block.
                chunk = line if self._is_kept else line[: select.PIPE_BUF]
                line = line[self._stream.write(chunk) or 0 :]
        except BrokenPipeError:
            raise  # whoever read our output has gone: no message is wanted
        except OSError as error:
            self._cut_back()
            self._stop(error, self.num_complete)
        self._num_bytes += len(result.content) + 1
        self.num_complete += 1
        self.num_errors += result.is_error

    def sync(self) -> None:
        """Have what was written survive a power cut. Raises BatchStopped."""
        if self._is_kept and self._num_synced < self.num_complete:
            try:
                os.fsync(self.descriptor)
            except OSError as error:
                self._stop(error, self._num_synced)
            self._num_synced = self.num_complete

    def close(self) -> None:
        """Give the lock back. Nothing is left to be written."""
        self._stream.close()

    def read_finished(self) -> None:
        """Take in the results that are there; a torn last line is cut off. Raises ConfigError, and
        before anything is changed.
        """
        if not self._is_kept:
            return
        end = 0
        with open(self.descriptor, "rb", closefd=False) as lines:
            lines.seek(0)
            # A line that does not begin as ours is not read to its end: it may be anything.
            while head := lines.read(len(HEAD)):
                if head != HEAD and not _is_torn(head):
                    self._refuse_file()
                line = head + lines.readline()
                is_last = not lines.peek(1)
                if not self._take_in(line):
                    # A lone torn line must show more of our form: it may be another's file.
                    is_ours = _is_torn(line) if self.num_complete else _is_torn_first(line)
                    if not is_last or not is_ours:
                        self._refuse_file()
                    break
                end += len(line)
            self.num_cut_bytes = lines.seek(0, os.SEEK_END) - end
        if self.num_cut_bytes:
            os.ftruncate(self.descriptor, end)
        os.lseek(self.descriptor, end, os.SEEK_SET)
        self._num_bytes = end
        self._num_synced = self.num_complete

    def _take_in(self, line: bytes) -> bool:
        """False when the line is not whole. Raises ConfigError when it is not one of ours."""
        try:
            result = json.loads(line)
        except (ValueError, RecursionError):
            return False
        is_ours = (
            isinstance(result, dict)
            and {"id", "index", "outputs", "error"} <= result.keys()
            and isinstance(result["id"], str | int)
            and isinstance(result["index"], int)
            and result["index"] >= 0
        )
        if not is_ours:
            self._refuse_file()
        if not line.endswith(b"\n"):
            return False
        is_error = result["error"] is not None
        if not self.finished.add(result["id"], result["index"], is_error=is_error):
            raise ConfigError(
                f"line {self.num_complete + 1} of {self.name} has an id or an index that an "
                "earlier line has; it was changed, give another --output"
            )
        self.num_complete += 1
        self.num_errors += is_error
        return True

    def _refuse_file(self) -> NoReturn:
        raise ConfigError(
            f"line {self.num_complete + 1} of {self.name} is not a result of this command, and it "
            "is not overwritten; give another --output"
        )

    def _wait_for_room(self, is_interrupted: Callable[[], bool]) -> None:
        while not select.select([], [self.descriptor], [], _WAIT_S)[1]:
            if is_interrupted():
                raise KeyboardInterrupt

    def _cut_back(self) -> None:
        """Remove the beginning of a line that could not be finished; if even that fails, the next
        run does it.
        """
        if self._is_kept:
            with contextlib.suppress(OSError):
                os.ftruncate(self.descriptor, self._num_bytes)

    def _stop(self, error: OSError, num_safe: int) -> NoReturn:
        way_out = f"{_WAY_OUT.get(error.errno or 0, 'mend that and ')}{_GO_ON}"
        raise BatchStopped(
            f"cannot write {self.name}: {error.strerror}; {num_safe} results are complete"
            + (f"; {way_out}" if self._is_kept else "")
        ) from error


def _is_torn(line: bytes) -> bool:
    """Whether this can be the beginning of a result: what a power cut left of it may be zeros."""
    begun = line.rstrip(b"\0\n")
    return begun.startswith(HEAD) or HEAD.startswith(begun)


_NEXT = b', "index": '
_BEGUN_ID = re.compile(rb'-?|"(?:[^"\\\n]|\\.)*\\?')
_WHOLE_ID = re.compile(rb'-?[0-9]+|"(?:[^"\\]|\\.)*"')


def _is_torn_first(line: bytes) -> bool:
    """Whether this begins like a result as far as its index, or was cut before that."""
    begun = line.rstrip(b"\0")
    if not begun.strip(b"\0\n"):
        return True
    if not begun.startswith(HEAD):
        return HEAD.startswith(begun)
    begun = begun.removeprefix(HEAD)
    whole = _WHOLE_ID.match(begun)
    if whole is None:
        return _BEGUN_ID.fullmatch(begun) is not None
    rest = begun[whole.end() :]
    return rest.startswith(_NEXT) or _NEXT.startswith(rest)


def open_results(path: str) -> ResultFile:
    """The output, locked; what it holds is not read yet. "-" is stdout. Raises ConfigError."""
    if path == "-":
        if sys.stdout is None:
            raise ConfigError("--output - needs an open stdout; give a file")
        return ResultFile("stdout", FileIO(1, "wb", closefd=False), is_kept=False)
    is_special = os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode)
    flags = os.O_WRONLY if is_special else os.O_RDWR | os.O_CREAT
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    except OSError as error:
        folder = os.path.dirname(path) or "."
        missing = f"the folder {folder} does not exist; make it, or "
        raise ConfigError(
            f"cannot write {path}: "
            + (missing if not os.path.isdir(folder) else f"{error.strerror}; ")
            + "give another --output"
        ) from error
    results = ResultFile(path, FileIO(descriptor, "wb"), is_kept=not is_special)
    try:
        if not is_special:
            _lock(descriptor, path)
    except BaseException:
        results.close()
        raise
    return results


def _lock(descriptor: int, path: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"another run is writing {path}; wait for its end, or give another --output"
        ) from None
    except OSError as error:
        say(f"{path} cannot be locked ({error.strerror}); see that no second run writes it")
