"""One shim process: an HTTP server in front of an engine, until it is told to stop."""

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass

import uvicorn

from ...engine.errors import ConfigError
from .app import make_app
from .engine import Engine, EngineAddress
from .protocol import BoundedProtocol

_POLL_S = 0.02
_READY_TIMEOUT_S = 2.0
_BACKLOG = 2048
_KEEP_ALIVE_S = 75


@dataclass(frozen=True)
class ShimOptions:
    """host and port to listen on. shares_port: with other processes. drain_timeout_s: what open
    calls get to end.
    """

    host: str
    port: int
    engine: EngineAddress
    shares_port: bool = False
    refuses_unknown: bool = True
    drain_timeout_s: float = 30.0


def bound_socket(options: ShimOptions) -> socket.socket:
    """Raises ConfigError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if options.shares_port:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listening.bind((options.host, options.port))
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"{options.host}:{options.port} cannot be listened on ({error.strerror}); give another "
            "--port or --host"
        ) from error
    return listening


async def serve_http(
    options: ShimOptions, listening: socket.socket, on_ready: Callable[[str], None]
) -> None:
    """Until SIGTERM or SIGINT. on_ready: called with the address once the engine serves."""
    engine = Engine(options.engine)
    app = make_app(
        engine,
        has_key=options.engine.key is not None,
        refuses_unknown=options.refuses_unknown,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            loop="none",  # the caller's
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(options.drain_timeout_s)),
        )
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its life is the supervisor's to tell
    following = asyncio.create_task(engine.run())
    telling = asyncio.create_task(_tell_ready(engine, server, listening, on_ready))
    try:
        await server.serve(sockets=[listening])
    finally:
        for task in (following, telling):
            task.cancel()
        await asyncio.gather(following, telling, return_exceptions=True)
        await engine.close()


async def _tell_ready(
    engine: Engine,
    server: uvicorn.Server,
    listening: socket.socket,
    on_ready: Callable[[str], None],
) -> None:
    while not (
        server.started and engine.is_connected and await engine.is_serving(_READY_TIMEOUT_S)
    ):
        await asyncio.sleep(_POLL_S)
    host, port = listening.getsockname()[:2]
    on_ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
