"""The shim's ASGI application: who may call what, and what every answer has in common.

A plain ASGI application, so any server can run it. Routes are Starlette's; bodies, answers and
streams are ours.
"""

import hashlib
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable

import grpc
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from ...engine.errors import EngineUnavailable, RequestError, SlowReader
from ...protos.quire.v1 import inference_pb2 as pb
from ..http_config import HttpConfig
from ..keys import bearer_key
from .absent import no_route
from .engine import Engine
from .http import REQUEST_ID, ClientGone, Receive, Reply, Scope, Send, header
from .openai.answers import DONE, event
from .openai.errors import TOO_SLOW, HttpError
from .openai.routes import OpenAI
from .origins import LocalOnly, with_cors
from .page import Page
from .server_routes import ServerRoutes

logger = logging.getLogger(__name__)

Handler = Callable[[Scope, Receive, Reply, str | None], Awaitable[None]]

# Codes whose texts the engine wrote for its caller.
_ENGINES_OWN = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
    }
)
_WRONG_KEY = "the key is not one of the server's; send the header Authorization: Bearer KEY"
_AWAY = "the engine is starting, stopping or gone; try again in a second"

_KNOWN_S, _MAX_KNOWN_KEYS = 60.0, 1024
_HEAD = ("HEAD", "GET")

_REQUEST_ID = re.compile(REQUEST_ID)


def make_app(
    engine: Engine, http: HttpConfig, *, has_key: bool, local_host: str | None = None
) -> ASGIApp:
    """The application in front of an engine, which is followed by whoever runs the application.

    has_key: the engine wants keys, so a call without one is refused here. local_host: everybody on
    this machine may call, at this host, but no web page from elsewhere.
    """
    refuses_unknown = http.unknown_fields == "refuse"
    openai = OpenAI(
        engine,
        refuses_unknown=refuses_unknown,
        response_role=http.response_role,
    )
    server = ServerRoutes(engine, refuses_unknown=refuses_unknown)
    page = Page()
    keys = Keys(engine) if has_key else None

    def route(method: str, path: str, handler: Handler, *, is_open: bool = False) -> Route:
        return Route(path, endpoint=Guarded(handler, method, keys=keys, is_open=is_open))

    app: ASGIApp = Router(
        routes=[
            route("GET", "/", page.front, is_open=True),
            route("POST", "/v1/chat/completions", openai.chat_completions),
            route("POST", "/v1/completions", openai.completions),
            route("GET", "/v1/models", openai.models),
            route("GET", "/v1/models/{name:path}", openai.model),
            route("POST", "/tokenize", server.tokenize),
            route("POST", "/detokenize", server.detokenize),
            route("GET", "/version", server.version),
            route("GET", "/metrics", server.metrics),
            route("GET", "/docs", page.docs, is_open=True),
            route("GET", "/openapi.json", server.openapi, is_open=True),
            route("GET", "/health", server.health, is_open=True),
            route("GET", "/ready", server.health, is_open=True),
            route("GET", "/ping", server.health, is_open=True),
        ],
        default=Guarded(no_route, None, is_open=True),
        redirect_slashes=False,
    )
    # In the way of every part of a stream, so only where they are asked for.
    if http.root_path:
        app = _under(http.root_path, app)
    app = with_cors(app, http.allowed_origins)
    return app if local_host is None else LocalOnly(app, local_host, http.allowed_origins)


def _under(root_path: str, app: ASGIApp) -> ASGIApp:
    """Takes a path off that a proxy has left on, or not."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        path = f"{root_path}/" if scope.get("path") == root_path else scope.get("path")
        await app({**scope, "root_path": root_path, "path": path}, receive, send)

    return serve


class Keys:
    """Remembers for a while which keys the engine knows, so that most calls need not ask."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[bytes, float] = {}  # digest -> until when; never the key itself

    async def check(self, key: str) -> None:
        """Raises AioRpcError for a key that the engine does not know."""
        now, digest = time.monotonic(), hashlib.sha256(key.encode()).digest()
        if self._known.get(digest, 0) > now:
            return
        await self._engine.call(self._engine.stub.ListModels, pb.ListModelsRequest(), key)
        if len(self._known) >= _MAX_KNOWN_KEYS:
            self._known.clear()
        self._known[digest] = now + _KNOWN_S


class Guarded:
    """One route: its method, the caller's key, a request id, and errors in the dialect's shape."""

    def __init__(
        self,
        handler: Handler,
        method: str | None,
        *,
        keys: Keys | None = None,
        is_open: bool = False,
    ) -> None:
        """method: the one that it takes; None is any. keys: what callers are checked by, if at all.
        is_open: for everybody, whatever he shows.
        """
        self._handler = handler
        self._method = method
        self._keys = keys
        self._is_open = is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send, secrets.token_hex(12))
        try:
            reply.request_id = _request_id(scope) or reply.request_id
            self._check_method(scope)
            key = None if self._is_open else await self._checked_key(scope)
            await self._handler(scope, receive, reply, key)
        except ClientGone:
            return
        except Exception as error:
            answer = as_http_error(error)
            if not reply.has_started:
                await reply.json(answer.body, answer.status, answer.headers)
            elif reply.has_events:
                await reply.last_event(event(answer.body) + DONE)
            else:
                raise  # the server closes the connection: half an answer must not look whole

    def _check_method(self, scope: Scope) -> None:
        method = scope["method"]
        # A server leaves the body of an answer to HEAD out.
        if self._method is None or method == self._method or (method, self._method) == _HEAD:
            return
        raise HttpError(
            405,
            f"{scope['path'][:200]} takes {self._method}, not {method[:20]}",
            type="invalid_request_error",
            headers={"allow": self._method},
        )

    async def _checked_key(self, scope: Scope) -> str | None:
        """The caller's key, which the engine knows. Raises HttpError, AioRpcError."""
        key = _key_of(scope)
        if self._keys is not None:
            if key is None:
                raise HttpError.of_code(
                    grpc.StatusCode.UNAUTHENTICATED,
                    "no key was sent; send the header Authorization: Bearer KEY",
                )
            # Before the body is read: reading is work.
            await self._keys.check(key)
        return key


def as_http_error(error: Exception) -> HttpError:
    """Whatever ended a call; what nobody foresaw is in the log and not in the answer."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, grpc.aio.AioRpcError):
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            return HttpError.of_code(error.code(), _WRONG_KEY)  # the engine's words are for gRPC
        if error.code() in _ENGINES_OWN:
            return HttpError.of_rpc(error)
        # gRPC's own words name sockets and addresses.
        logger.warning("an rpc failed: %s: %s", error.code().name, error.details())
        return HttpError.of_code(grpc.StatusCode.UNAVAILABLE, _AWAY, retry_after_s=1.0)
    if isinstance(error, RequestError):
        return HttpError.bad_request(str(error), param=error.field)
    if isinstance(error, SlowReader):
        return HttpError.of_code(grpc.StatusCode.UNAVAILABLE, TOO_SLOW)
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
    if not key or not key.isascii():
        raise HttpError.of_code(
            grpc.StatusCode.UNAUTHENTICATED, "the header Authorization must be: Bearer KEY"
        )
    return key


def _request_id(scope: Scope) -> str | None:
    given = header(scope, b"x-request-id")
    if given is not None and not _REQUEST_ID.fullmatch(given):
        raise HttpError.bad_request(
            "X-Request-Id must be 1 to 128 printable ASCII characters without spaces, got "
            f"{given!r:.80}; leave it out for one that is made"
        )
    return given
