"""Lines of the log: what they look like, and that nobody can forge one."""

import contextlib
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator

import pytest
from quire.serving import logs
from quire.serving.logs import configure_logs

Said = Callable[[], list[str]]
Configured = Callable[..., tuple[logging.Logger, Said]]

FORGED = "fine\n2026-11-21 15:04:05.123 INFO gateway: all is well\r\x1b[2K\x85\u2028\u202e\x00"


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Configured]:
    """configure_logs() on a stderr of its own; the logger of a module, and the lines so far."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # those of pytest would be closed
    closing: list[Callable[[], None]] = []

    def configure(format: str, level: str = "info") -> tuple[logging.Logger, Said]:
        stderr = io.StringIO()
        monkeypatch.setattr("sys.stderr", stderr)
        closing.append(configure_logs(level, format))

        def said() -> list[str]:
            while closing:
                closing.pop()()
            return stderr.getvalue().split("\n")[:-1]

        return logging.getLogger("quire.serving.gateway.service"), said

    yield configure
    while closing:
        closing.pop()()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_text_is_one_line_with_the_fields_behind(configured: Configured):
    logger, said = configured("text")
    logger.info("a request of %d tokens", 3, extra={"request_id": "r1", "what": "a b", "none": ""})
    (line,) = said()
    moment, rest = line[:23], line[23:]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}", moment)
    assert rest == ' INFO gateway: a request of 3 tokens request_id=r1 what="a b" none=""'


def test_json_is_one_object_a_line_with_the_fields_in_it(configured: Configured):
    logger, said = configured("json")
    fields = {"request_id": "r1", "num_tokens": 3, "seconds": float("nan"), "level": "forged"}
    logger.warning("ended %s", "well", extra=fields)
    (line,) = said()
    entry = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry.pop("ts"))
    assert entry == {
        "level": "warning",
        "logger": "quire.serving.gateway.service",
        "message": "ended well",
        "request_id": "r1",
        "num_tokens": 3,
        "seconds": "nan",
    }


@pytest.mark.parametrize("format", ["text", "json"])
def test_what_a_client_sends_forges_no_line(configured: Configured, format: str):
    logger, said = configured(format)
    logger.info("refused: %s", FORGED, extra={"request_id": FORGED})
    (line,) = said()
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    if format == "json":
        entry = json.loads(line)
        assert (entry["message"], entry["request_id"]) == (f"refused: {FORGED}", FORGED)
    else:
        shown = (
            r"fine\n2026-11-21 15:04:05.123 INFO gateway: all is well\r\x1b[2K\x85\u2028\u202e\x00"
        )
        assert line.endswith(f'refused: {shown} request_id="{shown}"')


def test_a_field_cannot_pass_for_two(configured: Configured):
    logger, said = configured("text")
    logger.info("x", extra={"a": "1 b=2", "c": "3", "d": 'say "hi"'})
    assert said()[0].endswith(r'x a="1 b=2" c=3 d="say \"hi\""')


@pytest.mark.parametrize("format", ["text", "json"])
def test_an_exception_is_with_its_line(configured: Configured, format: str):
    logger, said = configured(format)
    try:
        raise ValueError(FORGED)
    except ValueError:
        logger.exception("failed")
    first, *trace = said()
    if format == "json":
        assert trace == []
        assert "Traceback" in json.loads(first)["exception"]
    else:
        assert first.endswith(" ERROR gateway: failed")
        assert trace[0] == "  Traceback (most recent call last):"
        assert all(line.startswith("  ") and line.isprintable() for line in trace)
        assert any("all is well" in line for line in trace)


def test_what_is_below_the_level_is_not_said(configured: Configured):
    logger, said = configured("text", "warning")
    logger.info("a")
    logger.warning("b")
    assert len(said()) == 1
    logger, said = configured("text", "debug")
    logger.debug("c")
    assert len(said()) == 1


def test_a_library_has_its_own_name(configured: Configured):
    _, said = configured("text")
    logging.getLogger("grpc._cython").warning("odd")
    assert said()[0].endswith(" WARNING grpc: odd")


def test_any_value_can_be_a_field(configured: Configured):
    logger, said = configured("json")
    logger.info("x", extra={"error": ValueError("why"), "ids": [1, 2], "text": "\ud800"})
    entry = json.loads(said()[0])
    assert (entry["error"], entry["ids"], entry["text"]) == ("why", [1, 2], "\ud800")


def test_stderr_that_nobody_reads_stops_nobody(monkeypatch: pytest.MonkeyPatch):
    """What there is no room for is dropped: the event loop must not wait for a pipe."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    read, write = os.pipe()
    stderr = os.fdopen(write, "w")
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr(logs, "_MAX_RECORDS", 10)
    monkeypatch.setattr(logs, "_CLOSE_S", 0.1)
    try:
        close = configure_logs("info", "text")
        for _ in range(1000):  # a pipe holds some 60
            logging.getLogger("quire").info("x" * 1000)
        close()
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        os.close(read)
        with contextlib.suppress(BrokenPipeError):
            stderr.close()
