"""A supervised shim: `python -m quire.serving.shim --channel FD`.

The first message of the channel brings its options: {"http": {…HttpConfig…}, "serve":
{…ServeConfig…}, "front_socket": path, "ping_socket": path, "secret": hex}. It answers "ready" with
its address once the engine serves, or "refused" and exit code 2. SIGTERM drains it; it does not
outlive its supervisor.
"""

import asyncio
import os
import sys
from pathlib import Path

from ...engine.errors import UsageError
from .. import collector, malloc
from ..config import ServeConfig
from ..http_config import HttpConfig
from ..keys import front_key
from ..logs import configure_logs
from ..supervisor.channel import Message, channel_of
from .engine import EngineAddress
from .process import ShimOptions, bound_socket, serve_http, serves_only_here, tls_of


def main() -> int:
    """Exit code, of a shim that has drained or did not start."""
    channel = channel_of(sys.argv)
    message = channel.receive()
    serve = ServeConfig(**message["serve"])
    close_logs = configure_logs(serve.log_level, serve.log_format)
    channel.watch(lambda _: None)
    malloc.use_one_arena()

    import uvloop

    try:
        options = _options(message, serve)
        listening = bound_socket(options)
    except UsageError as error:
        channel.say("refused", why=str(error))
        return 2
    collector.calm()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(
            serve_http(options, listening, lambda address: channel.say("ready", address=address))
        )
    close_logs()
    return 0


def _options(message: Message, serve: ServeConfig) -> ShimOptions:
    http = HttpConfig(**message["http"])
    # Without keys the engine takes everybody, and shows no key to this one either.
    key = front_key(bytes.fromhex(message["secret"])) if serve.api_key else None
    return ShimOptions(
        serve.host,
        http,
        EngineAddress(f"unix:{message['front_socket']}", key),
        tls_of(serve),
        is_local=serves_only_here(serve, http, key),
        drain_timeout_s=serve.drain_timeout,
        ping_socket=Path(message["ping_socket"]),
    )


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
