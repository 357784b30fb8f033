"""`quire shim`: an HTTP front of its own, for an engine that runs elsewhere."""

from typing import Any

from .config import ServeConfig, check_bind
from .config_file import Given, add_config_flag
from .flags import add_flags
from .http_config import HttpConfig, LinkConfig

# Of ServeConfig, what is a shim's too.
_SHARED = ("host", "allow_unauthenticated", "drain_timeout", "log_level", "log_format")


def add_shim(verbs: Any) -> None:
    """Add `shim` to the subparsers of the command."""
    shim = verbs.add_parser("shim", help="OpenAI's HTTP interface in front of a quire engine")
    add_config_flag(shim)
    add_flags(shim.add_argument_group("engine"), LinkConfig)
    add_flags(shim.add_argument_group("HTTP"), HttpConfig, skip=("api_server_count",))
    others = tuple(name for name in ServeConfig.__dataclass_fields__ if name not in _SHARED)
    add_flags(shim.add_argument_group("server"), ServeConfig, skip=others)
    shim.set_defaults(run=lambda given: _run(Given(given, shim)))


def _run(given: Given) -> int:
    http = HttpConfig(**given.of(HttpConfig))
    link = LinkConfig(**given.of(LinkConfig))
    shared = {name: value for name, value in given.of(ServeConfig).items() if name in _SHARED}
    serve = ServeConfig(**shared)
    # With a key of its own, the engine has keys, and this shim wants them of its callers.
    check_bind(serve, () if link.engine_api_key is None else (link.engine_api_key,))

    import asyncio
    from pathlib import Path

    import uvloop

    from . import collector, malloc
    from .logs import configure_logs
    from .say import say
    from .shim.engine import EngineAddress
    from .shim.process import ShimOptions, bound_socket, serve_http, serves_only_here

    malloc.use_one_arena()
    close_logs = configure_logs(serve.log_level, serve.log_format)
    ca = None if link.engine_ca is None else Path(link.engine_ca)
    options = ShimOptions(
        serve.host,
        http,
        EngineAddress(link.engine, link.engine_api_key, ca),
        is_local=serves_only_here(serve, http, link.engine_api_key),
        drain_timeout_s=serve.drain_timeout,
    )
    listening = bound_socket(options)
    collector.calm()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve_http(options, listening, lambda at: say(f"serving on {at}")))
    close_logs()
    return 0
