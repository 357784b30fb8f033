"""Options from a YAML file (`--config FILE`), as vLLM's users keep them.

Its keys are the words of the flags, with - or _, and go through the flags' own parser: what a flag
refuses or renames, the file does too. Flags and variables win over it.
"""

import argparse
import dataclasses
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine.errors import ConfigError
from .flags import FALSE, TRUE, Collect, Parser, given_options, is_secret, variable_of
from .vllm_flags import is_switch, our_flag


class Given:
    """What flags, variables and the file of `--config` give."""

    def __init__(self, arguments: argparse.Namespace, parser: Parser) -> None:
        """parser: of the verb. Raises ConfigError; SystemExit for a key that is no flag."""
        self._arguments = arguments
        self.sources: dict[str, str] = {}  # option -> variable or file, of those that are no flags
        self._file = argparse.Namespace()
        if (path := getattr(arguments, "config", None)) is not None:
            words = _as_flags(path, parser.flags)
            named = Parser.speaking_of(parser, f"{parser.prog}: {path}")
            self._file = named.parse_args(words)

    def of(self, config: type) -> dict[str, Any]:
        """Field -> value. Raises ConfigError."""
        options = given_options(self._arguments, config)
        of_file = given_options(self._file, config, {})
        for field in dataclasses.fields(config):
            if field.name not in options and field.name in of_file:
                self.sources[field.name] = str(self._arguments.config)
            elif field.name in options and not hasattr(self._arguments, field.name):
                self.sources[field.name] = str(variable_of(field, os.environ))
        return of_file | options


def add_config_flag(parser: Parser) -> None:
    parser.add_argument(
        "--config",
        default=None,
        metavar="FILE",
        help="YAML file of options, a key for each flag; flags and variables win over it",
    )


def _as_flags(path: str, flags: Mapping[str, argparse.Action]) -> list[str]:
    where = f"the config file {path}"
    try:
        text = Path(path).expanduser().read_text("utf-8")
    except OSError as error:
        raise ConfigError(
            f"{where} cannot be read ({error.strerror}); give a YAML file that this user can read"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not text at byte {error.start}; save it as UTF-8") from None
    value = _load(text, where)
    if value is None:
        return []
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{where} must be a mapping of options, like port: 8000")
    words: list[str] = []
    seen: set[str] = set()
    for key, one in value.items():
        flag = f"--{key.replace('_', '-')}"
        if flag in ("--config", "--help"):
            raise ConfigError(f"{where} has {key}, which is for the command line alone")
        if flag in seen:
            raise ConfigError(f"{where} has {key} twice, with - and with _; keep one")
        seen.add(flag)
        words += _words(where, key, flag, one, flags)
    return words


def _load(text: str, where: str) -> Any:
    """Scalars stay as they are written: a key 0123 is no number, and no is no false. Empty ones and
    null are None. A key that stands twice is an error. Raises ConfigError.
    """
    import yaml  # 12 ms, which commands without a file need not wait for

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith(":null")]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.MarkedYAMLError(
                        problem=f"{key!r:.80} stands twice", problem_mark=node.start_mark
                    )
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply; it is one mapping of options") from None
    except yaml.MarkedYAMLError as error:
        # Without the line itself, which may hold a key.
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise ConfigError(f"{where} is not YAML: {line}{error.problem}") from None
    except yaml.YAMLError:
        raise ConfigError(
            f"{where} is not YAML: it has characters that YAML does not allow"
        ) from None


def _words(
    where: str, key: str, flag: str, value: Any, flags: Mapping[str, argparse.Action]
) -> list[str]:
    """Values are written with =, so that none is taken for a flag."""
    ours = our_flag(flag)
    action = flags.get(ours)
    if isinstance(value, list):
        texts = value
        if not isinstance(action, Collect) and action is not None:
            raise ConfigError(f"{where}: {key} takes one value, not a list")
    else:
        texts = [] if value is None else [value]
    if isinstance(action, Collect) and not texts and is_secret(action):
        raise ConfigError(f"{where}: {key} is empty; leave it out for none")
    if action is None:  # one of vLLM's, or unknown: what asks for nothing is passed over
        return _words_of_theirs(flag, value)
    for one in texts:
        if not isinstance(one, str):
            got = type(one).__name__ if is_secret(action) else reprlib.repr(one)
            raise ConfigError(
                f"{where}: {key} must be a plain value, or a list of them, got {got}; quote what "
                "is meant as text"
            )
    if isinstance(action, argparse.BooleanOptionalAction):
        return [_switch(where, key, ours, one) for one in texts]
    return [f"{ours}={one}" for one in texts]


def _words_of_theirs(flag: str, value: Any) -> list[str]:
    if value in (None, "", [], {}):
        return []
    if not isinstance(value, str):
        return [f"{flag}=…"]
    if value.lower() in TRUE:
        return [flag]
    if value.lower() in FALSE and flag == "--enable-chunked-prefill":
        return ["--no-enable-chunked-prefill"]
    return [] if value.lower() in FALSE and is_switch(flag) else [f"{flag}={value}"]


def _switch(where: str, key: str, flag: str, text: str) -> str:
    if text.lower() not in TRUE + FALSE:
        raise ConfigError(f"{where}: {key} must be true or false, got {text!r:.80}")
    if text.lower() in TRUE:
        return flag
    return f"--{flag.removeprefix('--no-')}" if flag.startswith("--no-") else f"--no-{flag[2:]}"
