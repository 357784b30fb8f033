"""One shim process: an HTTP server in front of an engine, until it is told to stop."""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from ...engine.errors import ConfigError
from .. import collector
from ..config import ServeConfig
from ..http_config import HttpConfig
from ..supervisor.ping import answering_pings
from ..tls import tls_context
from .app import make_app
from .engine import Engine, EngineAddress
from .protocol import IDLE_TIMEOUT_S, BoundedProtocol

_POLL_S = 0.02
_READY_TIMEOUT_S = 2.0
_BACKLOG = 2048
_MAX_CONNECTIONS = 4096


@dataclass(frozen=True)
class Tls:
    """Files, PEM. ca_certs: authorities of the certificates that clients must show, if any."""

    certfile: str
    keyfile: str
    ca_certs: str | None = None


@dataclass(frozen=True)
class ShimOptions:
    """host to listen on, at the port of http. is_local: without keys, so that only this machine's
    programs may call. drain_timeout_s: what open calls get to end. ping_socket: where a supervisor
    sees that this process moves.
    """

    host: str
    http: HttpConfig
    engine: EngineAddress
    tls: Tls | None = None
    is_local: bool = False
    drain_timeout_s: float = 30.0
    ping_socket: Path | None = None


def tls_of(config: ServeConfig) -> Tls | None:
    """Raises ConfigError for files that cannot be used."""
    if tls_context(config) is None:
        return None
    assert config.ssl_certfile is not None
    assert config.ssl_keyfile is not None
    return Tls(config.ssl_certfile, config.ssl_keyfile, config.ssl_ca_certs)


def serves_only_here(config: ServeConfig, http: HttpConfig, key: str | None) -> bool:
    """Whether whoever reaches the address may use it, and only this machine is meant to."""
    return key is None and http.uds is None and not config.allow_unauthenticated


def bound_socket(options: ShimOptions) -> socket.socket:
    """Raises ConfigError when the address cannot be had."""
    if options.http.uds is not None:
        return _unix_socket(Path(options.http.uds))
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if options.http.api_server_count > 1:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listening.bind((options.host, options.http.port))
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"{options.host}:{options.http.port} cannot be listened on ({error.strerror}); give "
            "another --port or --host"
        ) from error
    return listening


def _unix_socket(path: Path) -> socket.socket:
    """For this user and his group; in the place of one that nobody listens on."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
                if other.connect_ex(str(path)) == errno.ECONNREFUSED:
                    path.unlink()
        listening.bind(str(path))
        listening.listen()  # so that nobody takes it for one that is left over
        path.chmod(0o660)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"the socket {path} cannot be listened on ({error.strerror or error}); give another "
            "--uds"
        ) from error
    return listening


def address_of(listening: socket.socket, scheme: str) -> str:
    """As a client writes it."""
    name = listening.getsockname()
    if listening.family == socket.AF_UNIX:
        return f"unix:{name}"
    host, port = name[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class _Server(uvicorn.Server):
    """on_stop: called when it is told to stop."""

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_stop()
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises them again at the end, when there is still something to close."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


async def serve_http(
    options: ShimOptions, listening: socket.socket, on_ready: Callable[[str], None]
) -> None:
    """Until SIGTERM or SIGINT. on_ready: called with the address once the engine serves."""
    engine = Engine(options.engine)
    app = make_app(
        engine,
        options.http,
        has_key=options.engine.key is not None,
        local_host=options.host if options.is_local else None,
    )
    ours = _identity(options.http.uds)

    def on_stop() -> None:
        engine.is_leaving = True
        # Now, while it is ours: the next one may make its own before we have drained.
        if ours is not None and _identity(options.http.uds) == ours:
            Path(str(options.http.uds)).unlink()

    server = _Server(
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
            timeout_keep_alive=round(IDLE_TIMEOUT_S),
            limit_concurrency=_MAX_CONNECTIONS,
            ssl_certfile=options.tls.certfile if options.tls else None,
            ssl_keyfile=options.tls.keyfile if options.tls else None,
            ssl_ca_certs=options.tls.ca_certs if options.tls else None,
            ssl_cert_reqs=ssl.CERT_REQUIRED
            if options.tls and options.tls.ca_certs
            else ssl.CERT_NONE,
            timeout_graceful_shutdown=max(1, round(options.drain_timeout_s)),
        ),
        on_stop,
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its life is the supervisor's to tell
    tasks = [
        asyncio.create_task(engine.run()),
        asyncio.create_task(_tell_ready(options, engine, server, listening, on_ready)),
        asyncio.create_task(collector.collect(lambda: engine.num_open == 0)),
    ]
    try:
        async with answering_pings(options.ping_socket):
            await server.serve(sockets=[listening])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await engine.close()


def _identity(path: str | None) -> tuple[int, int] | None:
    """Of the file that stands there."""
    try:
        found = None if path is None else os.stat(path)
    except FileNotFoundError:
        return None
    return None if found is None else (found.st_dev, found.st_ino)


async def _tell_ready(
    options: ShimOptions,
    engine: Engine,
    server: uvicorn.Server,
    listening: socket.socket,
    on_ready: Callable[[str], None],
) -> None:
    while not (
        server.started and engine.is_connected and await engine.is_serving(_READY_TIMEOUT_S)
    ):
        await asyncio.sleep(_POLL_S)
    on_ready(address_of(listening, "http" if options.tls is None else "https"))
