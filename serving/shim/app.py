"""The shim's ASGI application: who may call what, and what every answer has in common.

A plain ASGI application, so any server can run it. Routes are Starlette's; bodies, answers and
streams are ours.
"""

import logging
import re
import secrets
from collections.abc import Awaitable, Callable

import grpc
from starlette.routing import Route, Router

from ...engine.errors import EngineUnavailable
from ..keys import bearer_key
from .engine import Engine
from .http import ClientGone, Receive, Reply, Scope, Send, header
from .openai.errors import HttpError
from .openai.routes import OpenAI
from .server_routes import ServerRoutes

logger = logging.getLogger(__name__)

Handler = Callable[[Scope, Receive, Reply, str | None], Awaitable[None]]

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def make_app(engine: Engine, *, has_key: bool, refuses_unknown: bool = True) -> Router:
    """The application in front of an engine, which is followed by whoever runs the application.

    has_key: the engine wants keys, so a call without one is refused here. refuses_unknown: fields
    that nobody knows are an error, not a line in the log.
    """
    openai = OpenAI(engine, refuses_unknown=refuses_unknown)
    server = ServerRoutes(engine)

    def route(method: str, path: str, handler: Handler, *, is_open: bool = False) -> Route:
        guarded = Guarded(handler, method, needs_key=has_key and not is_open)
        return Route(path, endpoint=guarded)

    # Without Starlette's middleware, which would stand in the way of every part of a stream.
    return Router(
        routes=[
            route("POST", "/v1/chat/completions", openai.chat_completions),
            route("POST", "/v1/completions", openai.completions),
            route("GET", "/v1/models", openai.models),
            route("GET", "/v1/models/{name:path}", openai.model),
            route("POST", "/tokenize", server.tokenize),
            route("POST", "/detokenize", server.detokenize),
            route("GET", "/version", server.version),
            route("GET", "/metrics", server.metrics),
            route("GET", "/openapi.json", server.openapi, is_open=True),
            route("GET", "/health", server.health, is_open=True),
            route("GET", "/ready", server.health, is_open=True),
            route("GET", "/ping", server.health, is_open=True),
        ],
        default=Guarded(_no_route, None, needs_key=False),
        redirect_slashes=False,
    )


class Guarded:
    """One route: its method, the caller's key, a request id, and errors in the dialect's shape."""

    def __init__(self, handler: Handler, method: str | None, *, needs_key: bool) -> None:
        """method: the one that it takes; None is any."""
        self._handler = handler
        self._method = method
        self._needs_key = needs_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send, secrets.token_hex(12))
        try:
            reply.request_id = _request_id(scope) or reply.request_id
            if self._method not in (None, scope["method"]):
                raise HttpError(
                    405,
                    f"{scope['path'][:200]} takes {self._method}, not {scope['method'][:20]}",
                    type="invalid_request_error",
                )
            key = _key_of(scope)
            if key is None and self._needs_key:
                raise HttpError.of_code(
                    grpc.StatusCode.UNAUTHENTICATED,
                    "no key was sent; send the header Authorization: Bearer KEY",
                )
            await self._handler(scope, receive, reply, key)
        except ClientGone:
            return
        except Exception as error:
            if reply.has_started:
                raise  # the server closes the connection: half an answer must not look whole
            answer = as_http_error(error)
            await reply.json(answer.body, answer.status, answer.headers)


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


async def _no_route(scope: Scope, _: Receive, __: Reply, ___: str | None) -> None:
    path = scope["path"][:200]
    raise HttpError(404, f"there is no route {path}", type="not_found_error")
