"""`quire engine` and `quire serve`: their flags, and what is checked before a process starts."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..engine.config import EngineConfig
from .config import ServeConfig, check_bind, read_keys
from .config_file import Given, add_config_flag
from .flags import add_flags
from .http_config import HttpConfig
from .say import say
from .vllm_flags import VARIABLES_WITHOUT_EFFECT, translate_flags


def add_engine(verbs: Any) -> None:
    """Add `engine` to the subparsers of the command."""
    engine = verbs.add_parser("engine", help="serve a model over gRPC")
    _add_model(engine)
    add_config_flag(engine)
    add_flags(engine.add_argument_group("server"), ServeConfig)
    add_flags(engine.add_argument_group("engine"), EngineConfig, skip=("model",))
    engine.set_defaults(run=lambda given: _run(Given(given, engine), with_http=False))
    engine.translate = _translated


def add_serve(verbs: Any) -> None:
    """Add `serve` to the subparsers of the command."""
    serve = verbs.add_parser("serve", help="serve a model over OpenAI's HTTP interface and gRPC")
    _add_model(serve)
    add_config_flag(serve)
    add_flags(serve.add_argument_group("HTTP"), HttpConfig)
    add_flags(serve.add_argument_group("server"), ServeConfig)
    add_flags(serve.add_argument_group("engine"), EngineConfig, skip=("model",))
    serve.set_defaults(run=lambda given: _run(Given(given, serve), with_http=True))
    serve.translate = _translated


def _translated(arguments: Sequence[str], known: Mapping[str, argparse.Action]) -> Sequence[str]:
    translated = translate_flags(arguments, known)
    for note in translated.notes:
        say(note)
    return translated.arguments


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=argparse.SUPPRESS,
        help="model folder or hub id; the embedded demo model if not given",
    )
    # As vLLM's guides write it.
    parser.add_argument("--model", dest="model", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _run(given: Given, *, with_http: bool) -> int:
    http = given.of(HttpConfig) if with_http else None
    HttpConfig(**http or {})
    engine = given.of(EngineConfig)
    serve = given.of(ServeConfig)
    EngineConfig(**engine)
    config = ServeConfig(**serve)
    keys = read_keys(config)
    check_bind(config, keys)
    _say_sources(given.sources)

    from .supervisor.command import Front, run_engine
    from .supervisor.supervisor import Limits

    # The file is read once: the keys stay those that were checked here.
    serve = {k: v for k, v in serve.items() if k != "api_key_file"} | {"api_key": keys}
    options = {"engine": engine, "serve": serve}
    fronts = [Front("gateway", _python("gateway"), options)]
    if http is not None:
        count = HttpConfig(**http).api_server_count
        for number in range(1, count + 1):
            name = "shim" if count == 1 else f"shim {number}"
            shim = {"http": http, "serve": serve}
            fronts.append(Front(name, _python("shim"), shim))
    limits = Limits(step_timeout_s=config.step_timeout, drain_timeout_s=config.drain_timeout)
    return run_engine(engine, fronts, limits)


def _say_sources(sources: Mapping[str, str]) -> None:
    """Where options are from that stand on no command line. Not their values: some are keys."""
    # Where programs are kept changes nothing of what is served.
    told = [f"{name} ({at})" for name, at in sources.items() if name != "cache_dir"]
    if told:
        say("from elsewhere: " + ", ".join(told))
    for name, why in VARIABLES_WITHOUT_EFFECT.items():
        if os.environ.get(name, "") not in ("", "0"):
            say(f"{name} has no effect: {why}")
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _python(process: str) -> tuple[str, ...]:
    # -P: the folder that we were started in is no place to import from.
    return (sys.executable, "-P", "-m", f"quire.serving.{process}")
