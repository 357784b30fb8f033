"""The flags of `quire bench` and the module that each of its verbs runs."""

import argparse
from importlib import import_module
from typing import Any

from ...engine.config import EngineConfig
from ...engine.errors import ConfigError
from ..flags import add_flags, given_options


def add_bench(verbs: Any) -> None:
    """Add `bench` to the subparsers of the command."""
    bench = verbs.add_parser("bench", help="measure throughput, latency or start-up")
    kinds = bench.add_subparsers(title="measurements", metavar="WHAT", required=True)

    throughput = _add(kinds, "throughput", "requests and tokens per second of many at once")
    throughput.add_argument("--num-prompts", type=AtLeast(1), default=1000)
    throughput.add_argument("--input-len", type=AtLeast(1), default=1024, help="tokens")
    throughput.add_argument("--output-len", type=AtLeast(1), default=128, help="tokens")
    _add_engine_flags(throughput)

    latency = _add(kinds, "latency", "seconds from submitting one batch to its last token")
    latency.add_argument("--batch-size", type=AtLeast(1), default=8)
    latency.add_argument("--input-len", type=AtLeast(1), default=32, help="tokens")
    latency.add_argument("--output-len", type=AtLeast(1), default=128, help="tokens")
    latency.add_argument("--num-iters-warmup", type=AtLeast(0), default=10)
    latency.add_argument("--num-iters", type=AtLeast(1), default=30)
    _add_engine_flags(latency)

    startup = _add(kinds, "startup", "seconds until ready, with an empty and a full cache")
    startup.add_argument("--num-iters-cold", type=AtLeast(0), default=3)
    startup.add_argument("--num-iters-warmup", type=AtLeast(0), default=1)
    startup.add_argument("--num-iters-warm", type=AtLeast(0), default=3)
    _add_engine_flags(startup)


def _add(kinds: Any, name: str, help_line: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=help_line)
    parser.add_argument(
        "model",
        nargs="?",
        default=argparse.SUPPRESS,
        help="model folder or hub id; the embedded demo model if not given",
    )
    if name != "startup":
        parser.add_argument("--n", type=AtLeast(1), default=1, help="answers to each prompt")
        parser.add_argument(
            "--disable-detokenize", action="store_true", help="measure token ids alone"
        )
    parser.add_argument("--output-json", metavar="FILE", help="write the figures there as JSON")
    parser.set_defaults(run=_run, module=name)
    return parser


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    add_flags(parser.add_argument_group("engine"), EngineConfig, skip=("model",))


def _run(arguments: argparse.Namespace) -> int:
    options = given_options(arguments, EngineConfig)
    if arguments.module != "startup":
        # Prompts that were computed before would be answered faster than new ones.
        options = {"enable_prefix_caching": False} | options
    EngineConfig(**options)  # refuse what is out of range before anything is measured
    if arguments.output_json is not None:
        _require_writable(arguments.output_json)
    run = import_module(f".{arguments.module}", __package__).run
    code: int = run(arguments, options)
    return code


def _require_writable(path: str) -> None:
    """Before minutes are spent. Raises ConfigError."""
    try:
        with open(path, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; give another --output-json"
        ) from error


class AtLeast:
    """A whole number that is not less than `low`."""

    def __init__(self, low: int) -> None:
        self._low = low

    def __call__(self, text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = self._low - 1
        if value < self._low:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {self._low}, got {text!r}"
            )
        return value
