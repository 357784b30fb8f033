"""`quire generate --input`: opens the files, runs, says how it went."""

import os
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from ...engine.errors import ConfigError
from ..say import say
from .line_reader import count_lines
from .progress import Progress
from .result_file import ResultFile, open_results
from .run import BatchRun, Start
from .unfinished import UnfinishedLines


def run_batch(
    input_path: str,
    output_path: str,
    start: Start,
    *,
    sampling: Mapping[str, Any],
    is_ordered: bool = False,
) -> int:
    """The exit code: 0, 1 when the output has errors, 130 or 143 when interrupted.

    "-" is stdin, or stdout. `start` makes the engine, once and only if a line needs it. Raises
    ConfigError for files that cannot be used, before that, and BatchStopped.
    """
    with ExitStack() as stack:
        descriptor = stack.enter_context(_open_input(input_path))
        results = stack.enter_context(closing(open_results(output_path)))
        _require_two_files(descriptor, results)
        results.read_finished()
        if results.num_cut_bytes:
            say(f"cut {results.num_cut_bytes} bytes of an unfinished line off {results.name}")
        if results.num_complete:
            say(f"{results.name} has {results.num_complete} results; going on from there")
        progress = stack.enter_context(closing(Progress(count_lines(descriptor))))
        lines = UnfinishedLines(descriptor, results.finished, progress)
        run = BatchRun(lines, results, progress, sampling=sampling, is_ordered=is_ordered)
        signal_code = run.run(start)
        progress.close()
        if signal_code is not None:
            say(f"interrupted; {results.num_complete} results are complete{results.go_on}")
            return signal_code
        if results.finished.num_unmet:
            say(
                f"{results.name} has {results.finished.num_unmet} results of lines that the input "
                "does not have"
            )
        say(progress.summary(results.num_errors - progress.num_errors))
        return 1 if results.num_errors else 0


@contextmanager
def _open_input(path: str) -> Iterator[int]:
    """The descriptor. Raises ConfigError."""
    if path == "-":
        if sys.stdin is None:
            raise ConfigError("--input - needs an open stdin; give a file")
        yield 0
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; give the file that holds the requests"
        ) from error
    try:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise ConfigError(f"cannot read {path}: it is a folder; give a file of requests")
        yield descriptor
    finally:
        os.close(descriptor)


def _require_two_files(descriptor: int, results: ResultFile) -> None:
    source, target = os.fstat(descriptor), os.fstat(results.descriptor)
    if stat.S_ISREG(source.st_mode) and os.path.samestat(source, target):
        raise ConfigError(f"the input and {results.name} are the same file; give another --output")
