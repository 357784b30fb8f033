"""The flags of `quire chat`, and the terminal it talks through."""

import argparse
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import Any

from ...engine.config import EngineConfig
from ...engine.errors import ConfigError
from ..flags import add_flags, given_options
from .conversation import Conversation


def add_chat(verbs: Any) -> None:
    """Add `chat` to the subparsers of the command."""
    chat = verbs.add_parser("chat", help="a conversation in the terminal")
    chat.add_argument(
        "model",
        nargs="?",
        default=argparse.SUPPRESS,
        help="model folder or hub id; the embedded demo model if not given",
    )
    chat.add_argument("--system", metavar="TEXT", help="what the model is told first")
    chat.add_argument("--load", metavar="FILE", help="go on with a conversation that /save wrote")
    add_flags(chat.add_argument_group("engine"), EngineConfig, skip=("model",))
    chat.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    # One conversation needs one row: fewer programs and pages than an engine that serves many.
    options = {"max_num_seqs": 1} | given_options(arguments, EngineConfig)
    conversation = Conversation()
    if arguments.load is not None:
        conversation.load(arguments.load)
    if arguments.system is not None:
        conversation.system = arguments.system

    from ...engine.llm import LLM
    from .session import Session

    # A byte that is no text, or a letter that the terminal has not, ends no conversation.
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    with LLM(**options) as llm:
        if not llm.get_tokenizer().has_chat_template:
            raise ConfigError(
                "this model has no chat template, so it is probably not made for conversations; "
                "give one with --chat-template, or use quire generate --prompt"
            )
        Session(llm, conversation, _reader(), _write).run()
    return 0


def _reader() -> Any:
    """Reads one line without its end, None at the end; what no terminal shows is written out, so
    that both sides can be read.
    """
    if not sys.stdin.isatty():

        def read_piped(prompt: str) -> str | None:
            line = sys.stdin.readline()
            if not line:
                return None
            line = line.rstrip("\r\n")
            print(prompt + line, flush=True)
            return line

        return read_piped
    with suppress(ImportError):
        import readline  # noqa: F401 (gives input() a history and editing)

    def read_typed(prompt: str) -> str | None:
        try:
            return input(prompt)
        except EOFError:
            print()
            return None

    return read_typed


def _write(text: str) -> None:
    print(text, end="", flush=True)
