"""The port that the metrics are read from, and those who do not read as Prometheus does."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop
from quire.engine.errors import ConfigError
from quire.serving.gateway import metrics_http
from quire.serving.gateway.metrics_http import start_metrics_server


def with_server(
    test: Callable[[int], Awaitable[Any]], text: str = "quire_serving 1\n", key: str | None = None
) -> Any:
    """What `test` returns, given the port of a server of this text."""

    async def run() -> Any:
        def is_allowed(header: str | None) -> bool:
            return key is None or header == f"Bearer {key}"

        server = await start_metrics_server("127.0.0.1", 0, lambda: text, is_allowed)
        async with server, asyncio.timeout(20):
            return await test(server.sockets[0].getsockname()[1])

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # the gateway's
        return runner.run(run())


async def exchange(port: int, sent: bytes) -> bytes:
    """The answer, up to the end of the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 ")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    return int(answer.split()[1])


@pytest.mark.parametrize("target", ["/metrics", "/metrics?name[]=up"])
def test_metrics_are_served(target: str):
    head = f"GET {target} HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n".encode()
    answer = with_server(lambda port: exchange(port, head))
    assert status(answer) == 200
    assert b"\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n" in answer
    assert answer.endswith(b"\r\n\r\nquire_serving 1\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"GET / HTTP/1.1", 404),
        (b"GET /metrics/ HTTP/1.1", 404),
        (b"GET /metricsx HTTP/1.1", 404),
        (b"POST /metrics HTTP/1.1", 404),
        (b"get /metrics HTTP/1.1", 404),
        (b"GET /metrics", 400),
        (b"GET /metrics HTTP/2", 400),
        (b"GET  /metrics HTTP/1.1", 400),
        (b"", 400),
        (b"\x16\x03\x01\x02\x00\x01\xff\x00", 400),
        (b"\xff" * 4000, 400),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 8200, 431),
    ],
)
def test_any_other_head_is_answered_and_the_next_one_served(line: bytes, expected: int):
    async def run(port: int) -> tuple[bytes, bytes]:
        hostile = await exchange(port, line + b"\r\n\r\n")
        return hostile, await exchange(port, b"GET /metrics HTTP/1.0\r\n\r\n")

    hostile, good = with_server(run)
    assert status(hostile) == expected
    assert status(good) == 200


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"", 401),
        (b"Authorization: Bearer other\r\n", 401),
        (b"X-Authorization: Bearer sesame\r\n", 401),
        (b"Authorization: Bearer sesame\r\n", 200),
        (b"aUTHORIZATION:Bearer sesame \r\n", 200),
        (b"Host: x\r\nAuthorization: Bearer sesame\r\nX: y\r\n", 200),
    ],
)
def test_a_key_is_needed_where_there_are_keys(header: bytes, expected: int):
    head = b"GET /metrics HTTP/1.1\r\n" + header + b"\r\n"
    answer = with_server(lambda port: exchange(port, head), key="sesame")
    assert status(answer) == expected
    assert (b"quire_serving" in answer) == (expected == 200)
    assert (b"\r\nWWW-Authenticate: Bearer\r\n" in answer) == (expected == 401)


def test_who_sends_no_whole_head_is_left_after_a_while(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics_http, "EXCHANGE_TIMEOUT_S", 0.2)
    answer = with_server(lambda port: exchange(port, b"GET /metrics HTTP/1.1\r\n"))
    assert answer == b""


def test_who_does_not_read_is_left_after_a_while(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics_http, "EXCHANGE_TIMEOUT_S", 0.2)

    async def run(port: int) -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        await asyncio.sleep(0.4)
        num_read = len(await reader.read())
        writer.close()
        await writer.wait_closed()
        return num_read, await exchange(port, b"GET / HTTP/1.1\r\n\r\n")

    num_read, after = with_server(run, text="x" * (64 << 20))
    assert num_read < 64 << 20
    assert status(after) == 404


def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics_http, "MAX_CONNECTIONS", 2)

    async def run(port: int) -> list[int]:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        refused = await exchange(port, b"")
        for _, writer in idle:
            writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        served = [await reader.read() for reader, _ in idle]
        for _, writer in idle:
            writer.close()
            await writer.wait_closed()
        again = await exchange(port, b"GET /metrics HTTP/1.1\r\n\r\n")
        return [status(answer) for answer in (refused, *served, again)]

    assert with_server(run) == [503, 200, 200, 200]


def test_a_port_that_is_taken_is_refused_with_the_way_out():
    async def run(port: int) -> str:
        with pytest.raises(ConfigError) as caught:
            await start_metrics_server("127.0.0.1", port, str, bool)
        return str(caught.value).replace(str(port), "9100")

    message = with_server(run)
    assert message.startswith("metrics_port 9100 on 127.0.0.1 cannot be opened (")
    assert message.endswith("); choose another, or 0 for any free one")
