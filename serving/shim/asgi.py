r"""The shim for an ASGI server of the user's choice, with options from QUIRE_* variables:

    QUIRE_ENGINE=127.0.0.1:50051 QUIRE_ENGINE_API_KEY=… \
      granian --interface asgi --factory quire.serving.shim.asgi:make

Limits of connections (sizes and times of heads, idle and unread ones) are then that server's.
"""

import argparse
import asyncio
import contextlib
from pathlib import Path

from starlette.types import ASGIApp

from ..config import ServeConfig, check_bind
from ..flags import given_options
from ..http_config import HttpConfig, LinkConfig
from .app import make_app
from .engine import Engine, EngineAddress
from .http import Receive, Scope, Send


def make() -> ASGIApp:
    """The application. Raises ConfigError, for one without keys too: nobody here knows the address
    that it will be served at, so QUIRE_ALLOW_UNAUTHENTICATED must say that this is meant.
    """
    none = argparse.Namespace()
    link = LinkConfig(**given_options(none, LinkConfig))
    shared = given_options(none, ServeConfig)
    allowed = bool(shared.get("allow_unauthenticated", False))
    keys = () if link.engine_api_key is None else (link.engine_api_key,)
    check_bind(ServeConfig(host="0.0.0.0", allow_unauthenticated=allowed), keys)
    return _Served(link, HttpConfig(**given_options(none, HttpConfig)))


class _Served:
    """Follows the engine from the server's start to its end, on the server's loop."""

    def __init__(self, link: LinkConfig, http: HttpConfig) -> None:
        self._link = link
        self._http = http
        self._app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        else:
            assert self._app is not None, "the server must speak ASGI's lifespan protocol"
            await self._app(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()  # lifespan.startup
        ca = None if self._link.engine_ca is None else Path(self._link.engine_ca)
        try:
            engine = Engine(EngineAddress(self._link.engine, self._link.engine_api_key, ca))
        except Exception as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        self._app = make_app(engine, self._http, has_key=self._link.engine_api_key is not None)
        following = asyncio.create_task(engine.run())
        await send({"type": "lifespan.startup.complete"})
        await receive()  # lifespan.shutdown
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following
        await engine.close()
        await send({"type": "lifespan.shutdown.complete"})
