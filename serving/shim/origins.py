"""Which web pages may call the server: browsers send what a page asks, whoever wrote the page.

CORS is Starlette's. Here is what protects a server without keys: a page elsewhere must not reach it
blindly, nor by a name that it lets point to this machine (DNS rebinding).
"""

import ipaddress
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from .http import Receive, Reply, Scope, Send
from .openai.errors import HttpError

_EXPOSED = ("x-request-id", "retry-after", "retry-after-ms")
_HEADERS = ("authorization", "content-type", "x-request-id")


def with_cors(app: ASGIApp, allowed_origins: tuple[str, ...]) -> ASGIApp:
    """Only calls that a browser makes for a page pass through more than before."""
    if not allowed_origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=allowed_origins,
        allow_methods=("GET", "POST"),
        # An SDK in a page sends headers of its own, x-stainless-…: whichever are asked for.
        allow_headers=("*",) if "*" in allowed_origins else _HEADERS,
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
        self._hosts = {host.lower(), *(_host_of(origin) for origin in allowed_origins)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_open and (why := self._refusal(scope)):
            error = HttpError(403, why, type="permission_error")
            await Reply(send, "none").json(error.body, 403)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> str | None:
        given = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = given.get(b"host", "")
        if host and not self._is_local(_host_of(f"//{host}")):
            return (
                f"the host {host!r:.200} is not this server's, which has no keys; use its address, "
                "start it with keys, or with --allowed-origins"
            )
        origin = given.get(b"origin")
        if origin is None or origin in self._origins or urlsplit(origin).netloc == host:
            return None
        return (
            f"pages of {origin!r:.200} may not call this server; start it with --allowed-origins "
            f"{origin:.200}"
        )

    def _is_local(self, host: str) -> bool:
        if host in self._hosts or host == "localhost" or host.endswith(".localhost"):
            return True
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False


def _host_of(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""
