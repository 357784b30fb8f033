"""GET /metrics on a port of its own, over the smallest HTTP that Prometheus needs.

Knows nothing of what it serves. Not prometheus_client's server: that one runs on other threads,
which would read counters while the gateway's thread changes them.
"""

import asyncio
import ssl
from collections.abc import Callable

from ...engine.errors import ConfigError

MAX_HEAD_BYTES = 8 << 10
MAX_CONNECTIONS = 16
EXCHANGE_TIMEOUT_S = 5.0

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def start_metrics_server(
    host: str,
    port: int,
    render: Callable[[], str],
    is_allowed: Callable[[str | None], bool],
    tls: ssl.SSLContext | None = None,
) -> asyncio.Server:
    """Serve render()'s text. is_allowed: asked with the Authorization header, None without one.

    Raises ConfigError when the port cannot be had.
    """
    server = _MetricsServer(render, is_allowed)
    try:
        return await asyncio.start_server(server.serve, host, port, limit=MAX_HEAD_BYTES, ssl=tls)
    except OSError as error:
        raise ConfigError(
            f"metrics_port {port} on {host} cannot be opened ({error.strerror or error}); choose "
            "another, or 0 for any free one"
        ) from error


class _MetricsServer:
    def __init__(self, render: Callable[[], str], is_allowed: Callable[[str | None], bool]) -> None:
        self._render = render
        self._is_allowed = is_allowed
        self._num_connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request of one connection, which is closed after it."""
        self._num_connections += 1
        try:
            async with asyncio.timeout(EXCHANGE_TIMEOUT_S):
                if self._num_connections > MAX_CONNECTIONS:
                    answer = _answer("503 Service Unavailable", "too many connections\n")
                else:
                    answer = await self._answer(reader)
                writer.write(answer)
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, ConnectionError):
            pass  # it does not send, or does not read
        finally:
            self._num_connections -= 1
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _answer("431 Request Header Fields Too Large", "the head has over 8 KiB\n")
        except asyncio.IncompleteReadError:
            return b""
        request_line, *lines = head.decode("latin-1").split("\r\n")
        words = request_line.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return _answer("400 Bad Request", "this is no HTTP/1 request\n")
        if words[0] != "GET" or words[1].partition("?")[0] != "/metrics":
            return _answer("404 Not Found", "there is only GET /metrics\n")
        if not self._is_allowed(_authorization(lines)):
            return _answer("401 Unauthorized", "a key is needed\n", "WWW-Authenticate: Bearer\r\n")
        return _answer("200 OK", self._render())


def _authorization(lines: list[str]) -> str | None:
    for line in lines:
        name, _, value = line.partition(":")
        if name.lower() == "authorization":
            return value.strip(" \t")
    return None


def _answer(status: str, text: str, header: str = "") -> bytes:
    body = text.encode()
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {_CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n"
        f"Connection: close\r\n{header}\r\n"
    )
    return head.encode() + body
