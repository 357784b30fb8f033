"""What a supervisor shows, on terminals, in files, and where nobody reads."""

import fcntl
import os
import pty
import struct
import termios
import time
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest
from quire.serving.supervisor.display import Display

from .supervised import fill

ERASE = "\r\x1b[K"
MIB = 1 << 20


class Terminal:
    """A pseudo terminal, and what was written to it."""

    def __init__(self, columns: int) -> None:
        self._ours, self.fd = pty.openpty()
        tty.setraw(self.fd)  # a newline stays one
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def close(self) -> None:
        for fd in (self._ours, self.fd):
            os.close(fd)

    def text(self) -> str:
        return os.read(self._ours, 1 << 16).decode()


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal(100)
    yield made
    made.close()


def bar(filled: int) -> str:
    return "━" * filled + "─" * (12 - filled)


def screen(text: str) -> list[str]:
    """The lines that are seen in the end."""
    return [line.rpartition(ERASE)[2] for line in text.split("\n")]


def test_progress_is_one_live_line_below_the_lines(terminal: Terminal) -> None:
    display = Display(terminal.fd, {})
    display.progress("programs", 0, 20)
    display.progress("weights", 64 * MIB, 256 * MIB)
    display.line("ops: all")
    display.progress("programs", 12, 20)
    display.progress("weights", 256 * MIB, 256 * MIB)
    display.progress("programs", 20, 20)
    display.line("ready")
    display.close()
    none, quarter = f"programs {bar(0)} 0/20", f"weights {bar(3)} 64/256 MiB"
    some, whole = f"programs {bar(7)} 12/20", f"weights {bar(12)} 256 MiB"
    assert terminal.text() == (
        f"{none}"
        f"{ERASE}{none}   {quarter}"
        f"{ERASE}ops: all\n{none}   {quarter}"
        f"{ERASE}{some}   {quarter}"
        f"{ERASE}{some}   {whole}"
        f"{ERASE}ready\n"
    )


@pytest.mark.parametrize(
    ("done", "total", "shown"),
    [
        (0, 4 * MIB, f"{bar(0)} 0.0/4.0 MiB"),
        (MIB // 2, MIB, f"{bar(6)} 0.5/1.0 MiB"),
        (100 * MIB, 1000 * MIB, f"{bar(1)} 100/1000 MiB"),
        (1024 * MIB, 3 * 1024 * MIB, f"{bar(4)} 1.0/3.0 GiB"),
        (7 * 1024 * MIB, 14 * 1024 * MIB, f"{bar(6)} 7/14 GiB"),
    ],
)
def test_weights_are_in_units_that_can_be_read(
    terminal: Terminal, done: int, total: int, shown: str
) -> None:
    display = Display(terminal.fd, {})
    display.progress("weights", done, total)
    display.close()
    assert terminal.text() == f"weights {shown}{ERASE}"


def test_progress_is_cut_to_the_width_of_the_terminal() -> None:
    """A line that wraps could not be written over."""
    terminal = Terminal(30)
    display = Display(terminal.fd, {})
    display.progress("programs", 1, 20)
    display.progress("weights", 1, 256 * MIB)
    display.progress("programs", 2, 20)
    display.line("x" * 50)  # lines are whole
    display.close()
    live = [part for part in terminal.text().split(ERASE) if part.startswith("programs")]
    terminal.close()
    assert [len(part) for part in live] == [len(f"programs {bar(0)} 1/20"), 29, 29]


def test_progress_of_what_came_to_nothing_is_cleared(terminal: Terminal) -> None:
    display = Display(terminal.fd, {})
    display.progress("programs", 1, 20)
    display.drop_progress()
    display.progress("programs", 0, 20)
    display.close()
    assert screen(terminal.text()) == [""]


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({}, "\x1b[1mready\x1b[0m\n"),
        ({"NO_COLOR": ""}, "\x1b[1mready\x1b[0m\n"),
        ({"NO_COLOR": "1"}, "ready\n"),
        ({"TERM": "dumb"}, "ready\n"),
    ],
)
def test_headline_is_bold_where_that_is_wanted(
    terminal: Terminal, environment: dict[str, str], shown: str
) -> None:
    display = Display(terminal.fd, environment)
    display.headline("ready")
    display.close()
    assert terminal.text() == shown


def test_a_dumb_terminal_gets_lines_only(terminal: Terminal) -> None:
    display = Display(terminal.fd, {"TERM": "dumb"})
    display.progress("programs", 1, 2)
    display.line("ready")
    display.close()
    assert terminal.text() == "ready\n"


def test_a_file_gets_whole_lines_only(tmp_path: Path) -> None:
    with (tmp_path / "said").open("w") as file:
        display = Display(file.fileno(), {})
        display.progress("programs", 1, 2)
        display.line("weights loaded")
        display.headline("ready in 1 s: \udcff")  # of a path that is no UTF-8
        display.close()
    assert (tmp_path / "said").read_text() == "weights loaded\nready in 1 s: \\udcff\n"


def test_a_reader_that_stops_reading_holds_nobody_up() -> None:
    ours, theirs = os.pipe()
    fill(theirs)
    display = Display(theirs, {})
    started = time.monotonic()
    for number in range(3000):  # more than are kept
        display.line(f"line {number}")
    assert time.monotonic() - started < 0.5
    display.close()
    assert time.monotonic() - started < 3
    os.close(ours)  # lets its thread go
    os.close(theirs)


def test_a_reader_that_is_slow_gets_every_line() -> None:
    ours, theirs = os.pipe()
    fill(theirs)
    display = Display(theirs, {})
    display.line("late")
    num_filled = 0
    while not (text := os.read(ours, 1 << 16)).endswith(b"late\n"):
        num_filled += len(text)
    assert num_filled >= 4096
    display.close()
    for fd in (ours, theirs):
        os.close(fd)


def test_a_reader_or_a_disk_that_is_gone_is_no_error() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    full = os.open("/dev/full", os.O_WRONLY)
    for fd in (theirs, full):
        display = Display(fd, {})
        for _ in range(3):
            display.line("ready")
            display.progress("programs", 1, 2)
        display.close()
        os.close(fd)


def test_without_stderr_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    display = Display()
    display.line("ready")
    display.progress("programs", 1, 2)
    display.headline("ready")
    display.close()
