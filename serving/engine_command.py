"""The flags of `quire engine`, and what is checked before any process is started."""

import argparse
import sys
from typing import Any

from ..engine.config import EngineConfig
from .config import ServeConfig, check_bind, read_keys
from .flags import add_flags, given_options


def add_engine(verbs: Any) -> None:
    """Add `engine` to the subparsers of the command."""
    engine = verbs.add_parser("engine", help="serve a model over gRPC")
    engine.add_argument(
        "model",
        nargs="?",
        default=argparse.SUPPRESS,
        help="model folder or hub id; the embedded demo model if not given",
    )
    add_flags(engine.add_argument_group("server"), ServeConfig)
    add_flags(engine.add_argument_group("engine"), EngineConfig, skip=("model",))
    engine.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    engine = given_options(arguments, EngineConfig)
    serve = given_options(arguments, ServeConfig)
    EngineConfig(**engine)
    config = ServeConfig(**serve)
    keys = read_keys(config)
    check_bind(config, keys)

    from .supervisor.command import Front, run_engine
    from .supervisor.supervisor import Limits

    # The file is read once: the gateway's keys stay those that were checked here.
    serve = {k: v for k, v in serve.items() if k != "api_key_file"} | {"api_key": keys}
    return run_engine(
        engine,
        # -P: the folder that we were started in is no place to import from.
        [
            Front(
                "gateway",
                (sys.executable, "-P", "-m", "quire.serving.gateway"),
                {"engine": engine, "serve": serve},
            )
        ],
        Limits(step_timeout_s=config.step_timeout, drain_timeout_s=config.drain_timeout),
    )
