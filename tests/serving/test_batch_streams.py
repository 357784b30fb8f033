"""`quire generate --input` with a stderr that fails and a stdout that nobody reads."""

import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from .batch_runs import FLAGS, child, many, write_lines

_MAIN = "import sys; from quire.serving.cli import main; sys.exit(main())"


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full", '2>"$PIPE"'])
def test_stderr_does_not_decide_about_the_run(tmp_path: Path, redirect: str) -> None:
    """Closed, it ended the run with an AttributeError, or progress came between the results; full
    or without a reader, it ended the run, or changed the exit code.
    """
    source = write_lines(tmp_path / "in", many(2, max_tokens=2))
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-c", _MAIN, "generate", "--input", source, "--output", "-", *FLAGS]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", *command],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        pass_fds=[write_end],
        env=os.environ | {"PIPE": f"/dev/fd/{write_end}"},
    )
    os.close(write_end)
    assert sorted(json.loads(line)["id"] for line in done.stdout.splitlines()) == ["r0", "r1"]
    assert done.returncode == 0


def num_waiting_bytes(descriptor: int) -> int:
    (number,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))
    assert isinstance(number, int)
    return number


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_ends_a_run_whose_output_nobody_reads(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """The system takes up a write again that a signal interrupted: the run went on waiting."""
    source = write_lines(tmp_path / "in", [{"id": "a"}, {"id": "long" * 100_000}])
    with child("--input", source, "--output", "-") as process:
        try:
            assert process.stdout is not None
            full = fcntl.fcntl(process.stdout, fcntl.F_GETPIPE_SZ)
            while num_waiting_bytes(process.stdout.fileno()) < full - 4096:
                assert process.poll() is None
            process.send_signal(number)
            assert process.wait(timeout=10) == code
        finally:
            process.kill()
        assert process.stderr is not None
        assert process.stderr.read() == "quire: interrupted; 1 results are complete\n"


def test_output_that_is_read_slowly_is_whole(tmp_path: Path) -> None:
    """A pipe takes it in pieces."""
    ids = [f"{i}" * 30_000 for i in range(10)]
    source = write_lines(tmp_path / "in", [{"id": line_id} for line_id in ids])
    with child("--input", source, "--output", "-") as process:
        out, _ = process.communicate(timeout=60)
    assert [json.loads(line)["id"] for line in out.splitlines()] == ids
    assert process.returncode == 1
