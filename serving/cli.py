"""The `quire` command: few verbs, each a function here or a module that is imported when it runs.

`--help` and wrong use load neither JAX nor numpy. Exit codes: 0, 1 failed, 2 wrong use, 130 and
143 interrupted.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..engine import notices
from ..engine.config import EngineConfig
from ..engine.errors import ConfigError, QuireError, UsageError
from ..engine.sampling_params import SamplingParams
from .bench.command import add_bench
from .chat.command import add_chat
from .engine_command import add_engine, add_serve
from .flags import Parser, add_flags, given_options
from .say import say
from .shim_command import add_shim

if TYPE_CHECKING:
    from ..engine.llm import LLM


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        parsed = _parser().parse_args(arguments)
        code: int = parsed.run(parsed)
        return code
    except UsageError as error:
        say(str(error))
        return 2
    except QuireError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; nothing is left to say, not even at interpreter exit.
        sys.stdout = None
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="quire", description="Language models on JAX, served from paged memory.")
    parser.add_argument("--version", action="version", version=f"quire {_version()}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    generate = verbs.add_parser("generate", help="continue a prompt, or the many of a file")
    generate.add_argument(
        "model",
        nargs="?",
        default=argparse.SUPPRESS,
        help="model folder or hub id; the embedded demo model if not given",
    )
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument(
        "--chat", metavar="MESSAGE", help="a user message, through the chat template"
    )
    prompt.add_argument(
        "--input", metavar="FILE", help="many requests, one JSON object a line; - is stdin"
    )
    batch = generate.add_argument_group("with --input")
    batch.add_argument(
        "--output", metavar="FILE", help="their results; what it holds already is not done again"
    )
    batch.add_argument("--ordered", action="store_true", help="results in the order of the input")
    sampling = generate.add_argument_group("sampling")
    for name, kind in _SAMPLING_FLAGS.items():
        sampling.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None)
    sampling.add_argument("--stop", action="append", help="text that ends the answer; repeatable")
    sampling.add_argument("--ignore-eos", action="store_true", default=None)
    add_flags(generate.add_argument_group("engine"), EngineConfig, skip=("model",))
    generate.set_defaults(run=_generate)

    add_chat(verbs)
    add_engine(verbs)
    add_serve(verbs)
    add_shim(verbs)
    add_bench(verbs)

    env = verbs.add_parser("env", help="versions, devices, chosen implementations, folders")
    env.set_defaults(run=_env)
    return parser


# The flags of `generate` for SamplingParams; --seed is the engine's, which seeds requests that
# bring none.
_SAMPLING_FLAGS = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
}


def _generate(arguments: argparse.Namespace) -> int:
    names = (*_SAMPLING_FLAGS, "stop", "ignore_eos")
    given = {n: v for n in names if (v := getattr(arguments, n)) is not None}
    SamplingParams(**given)  # refuse what is out of range before JAX is loaded
    if arguments.input is not None:
        return _generate_many(arguments, given)
    if arguments.output is not None or arguments.ordered:
        flag = "--output" if arguments.output is not None else "--ordered"
        raise ConfigError(f"{flag} goes with --input; one answer is printed")
    return _generate_one(arguments, given)


def _generate_many(arguments: argparse.Namespace, given: dict[str, Any]) -> int:
    from .batch.command import run_batch

    if arguments.output is None:
        raise ConfigError("--input needs --output FILE for the results; - is stdout")
    options = given_options(arguments, EngineConfig)
    EngineConfig(**options)  # refuse what is out of range before anything is written

    def start() -> "LLM":
        from ..engine.llm import LLM

        return LLM(**options)

    return run_batch(
        arguments.input, arguments.output, start, sampling=given, is_ordered=arguments.ordered
    )


def _generate_one(arguments: argparse.Namespace, given: dict[str, Any]) -> int:
    # One prompt needs one row: fewer programs and pages than an engine that serves many.
    options = {"max_num_seqs": 1} | given_options(arguments, EngineConfig)

    from ..engine.llm import LLM

    with LLM(**options) as llm:
        params = SamplingParams(**llm.default_sampling | given)
        if arguments.chat is not None:
            stream = llm.stream_chat([{"role": "user", "content": arguments.chat}], params)
        else:
            stream = llm.stream(arguments.prompt, params)
        started = time.perf_counter()
        first = None
        num_tokens = 0
        for delta in stream:
            first = first or time.perf_counter()
            num_tokens += len(delta.token_ids)
            print(delta.text, end="", flush=True)
        print()
        seconds = time.perf_counter() - started
        notices.say(
            f"{num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.1f} tokens/s, first "
            f"after {((first or started) - started) * 1000:.0f} ms"
        )
    return 0


def _env(_: argparse.Namespace) -> int:
    from .environment import describe

    for name, value in describe().items():
        print(f"{name:<18} {value}")
    return 0


def _version() -> str:
    from .. import __version__

    return __version__


if __name__ == "__main__":
    sys.exit(main())
