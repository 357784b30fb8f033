"""Clients of `quire serve` that vanish or do not read: their requests end, the others go on."""

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quire.serving.shim import http, protocol

from ..gateway.gateways import until
from .servers import Raw, Server, Web, body, request_bytes
from .shims import Front

Run = Callable[..., Any]
# Under way for seconds, whatever the machine does.
LONG = body(n=4, max_tokens=1900, stream=True)
# Many times what the buffers of a connection hold.
WIDE = body(n=16, max_tokens=1900, logprobs=20, stream=True)
NUM_HALF_REQUESTS = 300
TINY_BUFFER = 4096

Leave = Callable[[Raw], None]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        server.engine.until_said("quire: ready in ")
        yield server


def half_close(raw: Raw) -> None:
    """FIN alone: it would still read."""
    raw.writer.write_eof()


LEAVES: list[Leave] = [half_close, Raw.end, Raw.reset]


def num_fds(server: Server) -> int:
    return len(list(Path(f"/proc/{server.engine.pid_of('shim')}/fd").iterdir()))


@pytest.mark.parametrize("leave", LEAVES)
@pytest.mark.parametrize("is_streamed", [True, False])
def test_vanished_client_ends_its_request(server: Server, leave: Leave, is_streamed: bool) -> None:
    async def use(web: Web) -> None:
        aborts = "quire_requests_finished_total/abort"
        before = (await web.grpc.metrics())[aborts]
        raw = await Raw.open(server.port)
        await raw.send(request_bytes(LONG | {"stream": is_streamed}))
        if is_streamed:
            await raw.reader.readuntil(b"data: ")
        await web.grpc.until_metrics(lambda m: m["quire_requests_running"] == 4)
        leave(raw)
        await web.until_free()
        assert (await web.grpc.metrics())[aborts] == before + 1
        raw.end()

    server.run(use)


@pytest.mark.parametrize("leave", LEAVES)
def test_connection_dropped_at_every_byte_leaves_nothing(server: Server, leave: Leave) -> None:
    async def use(web: Web) -> None:
        undisturbed = await web.stream(body(max_tokens=600))
        before = num_fds(server)
        stream = asyncio.create_task(web.stream(body(max_tokens=600)))
        data = request_bytes(LONG)
        for num_bytes in range(len(data) + 1):
            raw = await Raw.open(server.port)
            await raw.send(data[:num_bytes])
            leave(raw)
            raw.end()
        assert await stream == undisturbed
        await web.until_free()
        await until(lambda: num_fds(server) <= before)

    server.run(use)


def test_connections_that_say_half_a_request_keep_nobody_waiting(server: Server) -> None:
    async def use(web: Web) -> None:
        undisturbed = await web.stream(body())
        data = request_bytes(LONG)
        half = [await Raw.open(server.port) for _ in range(NUM_HALF_REQUESTS)]
        for number, raw in enumerate(half):
            await raw.send(data[: number * len(data) // NUM_HALF_REQUESTS])
        assert await web.stream(body()) == undisturbed
        assert await web.health() == 200
        for raw in half:
            raw.reset()

    server.run(use)


def test_stream_that_is_not_read_is_given_up_and_says_so(server: Server) -> None:
    async def use(web: Web) -> None:
        undisturbed = await web.stream(body(max_tokens=200))
        raw = await Raw.open(server.port, receive_bytes=TINY_BUFFER)
        await raw.send(request_bytes(WIDE))
        await raw.reader.readuntil(b"data: ")  # it runs; how long until it is given up is open
        assert await web.stream(body(max_tokens=200)) == undisturbed
        # Long before its tokens are all made.
        await web.until_free()
        metrics = await web.grpc.metrics()
        assert metrics["quire_generation_tokens_total"] < 16 * 1900
        *_, last, done, end = (await raw.rest()).split(b"\n\n")
        error = json.loads(last.partition(b"data: ")[2])["error"]
        assert "read faster" in error["message"]
        assert (done, end) == (b"data: [DONE]", b"\r\n0\r\n\r\n")
        raw.end()

    server.run(use)


# In this process, where time is a test's to say


async def opened(front: Front, **options: Any) -> Raw:
    return await Raw.open(int(front.url.rpartition(":")[2]), **options)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_answer_that_is_never_read_ends_its_connection(
    front: Run, monkeypatch: pytest.MonkeyPatch, is_streamed: bool
) -> None:
    monkeypatch.setattr(protocol, "WRITE_TIMEOUT_S", 0.3)
    real, aborted = protocol.BoundedProtocol._abort, list[str]()

    def noted(self: protocol.BoundedProtocol) -> None:
        aborted.append("once")
        real(self)

    monkeypatch.setattr(protocol.BoundedProtocol, "_abort", noted)
    made = protocol.BoundedProtocol.connection_made

    def narrow(self: protocol.BoundedProtocol, transport: asyncio.Transport) -> None:
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, TINY_BUFFER)
        made(self, transport)

    # The kernel would keep 4 MiB of an answer, and larger ones take a busy machine too long.
    monkeypatch.setattr(protocol.BoundedProtocol, "connection_made", narrow)
    wide = body([[5] * 1000] * 2, echo=True, logprobs=20, max_tokens=0, stream=is_streamed)

    async def use(front: Front) -> None:
        raw = await opened(front, receive_bytes=TINY_BUFFER)
        raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await raw.send(request_bytes(wide))
        await until(lambda: aborted)
        assert not front.served.gateway.metrics.num_open or is_streamed
        raw.writer.transport.resume_reading()  # type: ignore[attr-defined]
        answer = await raw.rest()
        assert answer.startswith(b"HTTP/1.1 200")
        assert not answer.endswith((b"\r\n0\r\n\r\n", b"}}"))
        assert aborted == ["once"]
        raw.end()

    front(use)


def test_body_that_comes_too_slowly_is_refused(front: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a byte of it comes."""
    monkeypatch.setattr(http, "BODY_TIMEOUT_S", 0.3)

    async def use(front: Front) -> None:
        raw = await opened(front)
        data = request_bytes(LONG)
        head_bytes = data.index(b"\r\n\r\n") + 4
        await raw.send(data[:head_bytes])
        answer = asyncio.create_task(raw.reader.readuntil(b"}}"))
        for at in range(head_bytes, len(data) - 1):
            await raw.send(data[at : at + 1])
            await asyncio.wait([answer], timeout=0.02)
            if answer.done():
                break
        assert b"HTTP/1.1 408 " in await answer
        raw.end()

    front(use)


GOOD = request_bytes(body(max_tokens=2))
CHANGES = st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=3)


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.binary(max_size=80) | CHANGES)
def test_bytes_that_are_no_request_are_refused(
    front: Run, monkeypatch: pytest.MonkeyPatch, drawn: Any
) -> None:
    """Drawn freely, or a good request with some bytes changed."""
    for where, name in (
        (protocol, "HEAD_TIMEOUT_S"),
        (protocol, "IDLE_TIMEOUT_S"),
        (http, "BODY_TIMEOUT_S"),
    ):
        monkeypatch.setattr(where, name, 0.1)
    data = bytearray(GOOD)
    if isinstance(drawn, bytes):
        data = bytearray(drawn)
    else:
        for at, byte in drawn:
            data[at] = byte

    async def use(front: Front) -> None:
        raw = await opened(front)
        await raw.send(bytes(data))
        answer = await raw.rest()
        raw.end()
        assert answer == b"" or answer.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4")), answer[:300]

    front(use)
