"""The shim's ASGI application: who may call what, and what every answer has in common.

A plain ASGI application, so any server can run it. Routes are Starlette's; bodies, answers and
streams are ours.
"""

import logging
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from starlette.applications import Starlette
from starlette.routing import Route

from ...engine.errors import EngineUnavailable
from ..keys import bearer_key
from .engine import Engine
from .http import ClientGone, Message, Receive, Scope, Send, encoded, header, send_json
from .openai.errors import HttpError
from .openai.routes import OpenAI
from .server_routes import ServerRoutes

logger = logging.getLogger(__name__)

Handler = Callable[[Scope, Receive, Send, str | None], Awaitable[None]]

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def make_app(engine: Engine, *, has_key: bool, refuses_unknown: bool = True) -> Starlette:
    """The application in front of an engine, which is followed by whoever runs the application.

    has_key: the engine wants keys, so a call without one is refused here. refuses_unknown: fields
    that nobody knows are an error, not a line in the log.
    """
    openai = OpenAI(engine, refuses_unknown=refuses_unknown)
    server = ServerRoutes(engine)

    def route(method: str, path: str, handler: Handler, *, is_open: bool = False) -> Route:
        guarded = Guarded(handler, needs_key=has_key and not is_open)
        return Route(path, endpoint=guarded, methods=[method])

    return Starlette(
        routes=[
            route("POST", "/v1/chat/completions", openai.chat_completions),
            route("POST", "/v1/completions", openai.completions),
            route("GET", "/v1/models", openai.models),
            route("GET", "/v1/models/{name:path}", openai.model),
            route("POST", "/tokenize", server.tokenize),
            route("POST", "/detokenize", server.detokenize),
            route("GET", "/version", server.version),
            route("GET", "/metrics", server.metrics),
            route("GET", "/health", server.health, is_open=True),
            route("GET", "/ready", server.health, is_open=True),
            route("GET", "/ping", server.health, is_open=True),
        ],
        exception_handlers={404: _not_found, 405: _wrong_method},
    )


class Guarded:
    """One route: the caller's key, a request id, and errors in the dialect's shape."""

    def __init__(self, handler: Handler, *, needs_key: bool) -> None:
        self._handler = handler
        self._needs_key = needs_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = secrets.token_hex(12)
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] += encoded({"x-request-id": request_id})
            await send(message)

        try:
            request_id = _request_id(scope) or request_id
            scope.setdefault("state", {})["request_id"] = request_id
            key = _key_of(scope)
            if key is None and self._needs_key:
                raise HttpError.of_code(
                    grpc.StatusCode.UNAUTHENTICATED,
                    "no key was sent; send the header Authorization: Bearer KEY",
                )
            await self._handler(scope, receive, sending, key)
        except ClientGone:
            return
        except Exception as error:
            if started:
                raise  # the server closes the connection: half an answer must not look whole
            answer = as_http_error(error)
            await send_json(sending, answer.body, answer.status, answer.headers)


def as_http_error(error: Exception) -> HttpError:
    """Whatever ended a call; what nobody foresaw is in the log and not in the answer."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, grpc.aio.AioRpcError):
        return HttpError.of_code(error.code(), error.details() or error.code().name)
    if isinstance(error, EngineUnavailable):
        return HttpError.of_code(
            grpc.StatusCode.UNAVAILABLE, str(error), retry_after_s=error.retry_after_s
        )
    logger.error("a call failed", exc_info=error)
    return HttpError(500, "the server failed at this call; its log says why", type="server_error")


def _key_of(scope: Scope) -> str | None:
    """The caller's key; None without one. Raises HttpError for a header that has none."""
    value = header(scope, b"authorization")
    if value is None:
        return None
    key = bearer_key(value)
    if not key:
        raise HttpError.of_code(
            grpc.StatusCode.UNAUTHENTICATED, "the header Authorization must be: Bearer KEY"
        )
    return key


def _request_id(scope: Scope) -> str | None:
    given = header(scope, b"x-request-id")
    if given is not None and not _REQUEST_ID.fullmatch(given):
        raise HttpError.bad_request(
            "X-Request-Id must be 1 to 128 printable ASCII characters without spaces"
        )
    return given


async def _not_found(request: Any, _: Exception) -> Any:
    return _answer(404, f"there is no route {request.url.path[:200]}", "not_found_error")


async def _wrong_method(request: Any, _: Exception) -> Any:
    message = f"{request.url.path[:200]} does not take {request.method[:20]}"
    return _answer(405, message, "invalid_request_error")


def _answer(status: int, message: str, kind: str) -> Callable[..., Awaitable[None]]:
    error = HttpError(status, message, type=kind)

    async def answer(_: Scope, __: Receive, send: Send) -> None:
        await send_json(send, error.body, status)

    return answer
