"""Messages that cannot be decoded are refused with a status. gRPC itself would answer UNKNOWN with
the name of a Python exception, and write a traceback into the log for each.
"""

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from ...engine.errors import RequestError
from .statuses import abort


class _Undecodable:
    """Takes the place of a message."""


def _refusal() -> RequestError:
    return RequestError("the message is not what the .proto says; was it made by another version?")


class DecodingInterceptor(grpc.aio.ServerInterceptor):
    """Puts a border around the decoding of every request of one service."""

    def __init__(self, service: str) -> None:
        """service: its full name."""
        self._prefix = f"/{service}/"

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or not details.method.startswith(self._prefix):
            return handler
        decode = handler.request_deserializer

        def decoded(data: bytes) -> Any:
            try:
                return decode(data)
            except DecodeError:
                return _Undecodable()

        guarded = _stream(handler) if handler.request_streaming else _unary(handler)
        return guarded._replace(request_deserializer=decoded)


def _unary(handler: Any) -> Any:
    """For handlers that take one message."""
    name = "unary_stream" if handler.response_streaming else "unary_unary"
    answer: Callable[[Any, Any], Any] = getattr(handler, name)

    async def checked(request: Any, context: Any) -> Any:
        if isinstance(request, _Undecodable):
            await abort(context, _refusal())
        return await answer(request, context)

    return handler._replace(**{name: checked})


def _stream(handler: Any) -> Any:
    """For handlers that take a stream of messages: the first bad one raises RequestError there."""
    name = "stream_stream" if handler.response_streaming else "stream_unary"
    answer: Callable[[Any, Any], Any] = getattr(handler, name)

    async def checked(requests: AsyncIterator[Any], context: Any) -> Any:
        async def good() -> AsyncIterator[Any]:
            async for request in requests:
                if isinstance(request, _Undecodable):
                    raise _refusal()
                yield request

        return await answer(good(), context)

    return handler._replace(**{name: checked})
