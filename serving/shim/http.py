"""Requests and responses over ASGI, as much as the dialects need: bodies that are read with limits,
JSON answers, server-sent events, and the end of work whose client has gone.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import orjson

from ...engine.errors import RequestError
from ..strict_json import BadNumber, bad_number_field, read_object
from .openai.errors import HttpError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_BODY_BYTES = 32 << 20
# A pattern of the header X-Request-Id.
REQUEST_ID = r"[\x21-\x7e]{1,128}"
# From the head of a request to the end of its body.
BODY_TIMEOUT_S = 60.0


_EVENT_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # a proxy that gathers them would undo the streaming
}


class ClientGone(Exception):
    """Nobody reads the answer any more."""


def header(scope: Scope, name: bytes) -> str | None:
    """The value of a header that stands once; None if it is missing. Raises HttpError."""
    values = [value for key, value in scope["headers"] if key == name]
    if len(values) > 1:
        raise HttpError.bad_request(f"the header {name.decode()} stands twice; send it once")
    return values[0].decode("latin-1") if values else None


async def read_json_object(scope: Scope, receive: Receive) -> dict[str, Any]:
    """The body, which must be one JSON object. Raises HttpError, ClientGone."""
    kind = (header(scope, b"content-type") or "application/json").partition(";")[0].strip()
    if kind.lower() != "application/json":
        raise HttpError(
            415,
            f"the content type {kind!r:.80} is not understood; send application/json",
            type="invalid_request_error",
        )
    if header(scope, b"content-encoding") not in (None, "identity"):
        raise HttpError(
            415,
            "compressed bodies are not read; send it as it is",
            type="invalid_request_error",
        )
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            body = await _read_body(receive)
    except TimeoutError:
        raise HttpError(
            408,
            f"the body did not come within {BODY_TIMEOUT_S:g} s",
            type="invalid_request_error",
        ) from None
    try:
        return read_object(body, "the body")
    except RequestError as error:
        field = bad_number_field(body) if isinstance(error, BadNumber) else None
        raise HttpError.bad_request(
            str(error), param=field and field[:80], code="invalid_json"
        ) from error


async def _read_body(receive: Receive) -> bytes:
    parts, num_bytes = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        num_bytes += len(parts[-1])
        if num_bytes > MAX_BODY_BYTES:
            raise HttpError(
                413,
                f"the body has more than {MAX_BODY_BYTES >> 20} MiB; send less",
                type="invalid_request_error",
            )
        if not message.get("more_body"):
            return b"".join(parts)


class Reply:
    """The answer to one request, whole or as it comes."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.has_started = False
        self.has_events = False  # and not their end

    async def json(
        self, payload: Any, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        await self.raw(orjson.dumps(payload), "application/json", status, headers)

    async def raw(
        self,
        body: bytes,
        content_type: str,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        named = {"content-type": content_type, "content-length": str(len(body)), **(headers or {})}
        await self._start(status, named)
        await self._send({"type": "http.response.body", "body": body})

    async def events(self, events: AsyncIterator[bytes]) -> None:
        """Server-sent events as they come. Nothing is sent before the first one is there, so what
        goes wrong before is still a status of its own.
        """
        first = await anext(events)
        await self._start(200, _EVENT_HEADERS)
        self.has_events = True
        await self._part(first)
        async for body in events:  # not by _part(): a call for each token of each stream
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
        await self._end_events()

    async def last_event(self, body: bytes) -> None:
        """What went wrong while events were sent."""
        await self._part(body)
        await self._end_events()

    async def _end_events(self) -> None:
        self.has_events = False
        await self._send({"type": "http.response.body", "body": b""})

    async def _part(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.has_started = True
        encoded = [
            (name.encode("latin-1"), value.encode("latin-1"))
            for name, value in (*headers.items(), ("x-request-id", self.request_id))
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})


async def unless_client_goes(receive: Receive, work: Awaitable[None]) -> None:
    """Do the work; cancel it when the client disconnects, and raise ClientGone then."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(gone())
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        await working
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
