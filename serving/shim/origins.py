"""Which web pages may call the server: browsers send what a page asks, whoever wrote the page.

CORS is Starlette's. Here is what protects a server without keys: a page elsewhere must not reach it
blindly, nor by a name that it lets point to this machine (DNS rebinding).
"""

import ipaddress
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from ..http_config import ORIGIN
from .http import Receive, Reply, Scope, Send
from .openai.errors import HttpError

_EXPOSED = ("x-request-id", "retry-after", "retry-after-ms")


def with_cors(app: ASGIApp, allowed_origins: tuple[str, ...]) -> ASGIApp:
    """Only calls that a browser makes for a page pass through more than before."""
    if not allowed_origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=allowed_origins,
        allow_methods=("GET", "POST"),
        # Whichever are asked for: an SDK in a page sends headers of its own, x-stainless-….
        allow_headers=("*",),
        expose_headers=_EXPOSED,
        max_age=600,
    )


class LocalOnly:
    """In front of a server without keys on a loopback address: refuses calls that a page elsewhere
    may have caused, but for allowed origins.
    """

    def __init__(self, app: ASGIApp, host: str, allowed_origins: tuple[str, ...]) -> None:
        self._app = app
        self._is_open = "*" in allowed_origins
        self._origins = frozenset(allowed_origins)
        names = {_host_of(origin) for origin in allowed_origins if origin != "*"}
        self._hosts = {"localhost", host.lower()} | names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_open and (why := self._refusal(scope)):
            error = HttpError(403, why, type="permission_error")
            await Reply(send, "none").json(error.body, 403)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> str | None:
        given = {name: value.decode("latin-1").lower() for name, value in scope["headers"]}
        host, origin = given.get(b"host", ""), given.get(b"origin")
        if host and not self._is_ours(_host_of(f"//{host}")):
            return (
                f"the host {host!r:.200} is not this server's, which has no keys; use its address, "
                "or start it with keys, with --allowed-origins or with --allow-unauthenticated"
            )
        # A page of this server, or no page at all.
        if origin is None or origin in self._origins or origin.partition("://")[2] == host:
            return None
        way_out = f" {origin:.200}" if ORIGIN.fullmatch(origin) else ""
        return (
            f"the page's origin {origin!r:.200} is not allowed, and this server has no keys; start "
            f"it with --allowed-origins{way_out}, or with keys"
        )

    def _is_ours(self, host: str) -> bool:
        """Any address too: a page can let a name point here, but an address is what it says."""
        if host in self._hosts or host.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return False
        return True


def _host_of(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").removesuffix(".")
    except ValueError:
        return ""
