"""uvicorn's HTTP protocol with the limits it does not have: how long and how large the head of a
request may be, how long a connection may idle, and how long an answer may stay unread.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10
HEAD_TIMEOUT_S = 15.0
IDLE_TIMEOUT_S = 75.0
# What is written and not read in this time ends the connection.
WRITE_TIMEOUT_S = 30.0

_REFUSALS = {
    408: b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
    431: b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n"
    b"content-length: 0\r\n\r\n",
}


class BoundedProtocol(HttpToolsProtocol):
    """Ends a connection that is of no use to its client, or of too much to him."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._is_in_head = True
        self._is_refused = False
        self._num_head_bytes = 0
        self._write_timer: asyncio.TimerHandle | None = None
        self._read_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, 408)

    def connection_lost(self, exc: Exception | None) -> None:
        self._read_timer.cancel()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        super().data_received(data)
        if self._is_in_head:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self._refuse(431)

    def on_message_begin(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            # Pipelined. uvicorn would tell the answer under way nothing of its client's end.
            self._abort()
            return
        self._is_in_head, self._num_head_bytes = True, 0
        self._read_timer.cancel()
        self._read_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, 408)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._is_refused:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_refused:
            return
        if not self._is_in_head:  # a trailer, of which there may be any number
            self._abort()
            return
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_refused:
            return
        self._is_in_head = False
        self._read_timer.cancel()
        if sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refuse(431)
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        # Whatever comes that is not the head of a request does not count.
        self._read_timer.cancel()
        self._read_timer = self.loop.call_later(IDLE_TIMEOUT_S, self.transport.close)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, self._abort)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def _refuse(self, status: int) -> None:
        self._is_refused = True
        if not self.transport.is_closing():
            self.transport.write(_REFUSALS[status])
            self.transport.close()

    def _abort(self) -> None:
        self._is_refused = True
        self.transport.abort()
