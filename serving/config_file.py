"""Options from a YAML file (`--config FILE`), as vLLM's users keep them.

Its keys are the words of the flags, with - or _, and go through the flags' own parser: what a flag
refuses or renames, the file does too. Flags and variables win over it.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine.errors import ConfigError
from .flags import Parser, given_options


class Given:
    """What flags, variables and the file of `--config` give."""

    def __init__(self, arguments: argparse.Namespace, parser: Parser) -> None:
        """parser: of the verb. Raises ConfigError; SystemExit for a key that is no flag."""
        self._arguments = arguments
        self._file = argparse.Namespace()
        if (path := getattr(arguments, "config", None)) is not None:
            words = _as_flags(path, parser.flags)
            named = Parser.speaking_of(parser, f"{parser.prog}: {path}")
            self._file = named.parse_args(words)

    def of(self, config: type) -> dict[str, Any]:
        """Field -> value. Raises ConfigError."""
        return given_options(self._file, config, {}) | given_options(self._arguments, config)


def add_config_flag(parser: Parser) -> None:
    parser.add_argument(
        "--config",
        default=None,
        metavar="FILE",
        help="YAML file of options, a key for each flag; flags and variables win over it",
    )


def _as_flags(path: str, flags: Mapping[str, argparse.Action]) -> list[str]:
    import yaml

    where = f"the config file {path}"
    try:
        value = yaml.safe_load(Path(path).expanduser().read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{where} cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{where} is not YAML: {error}") from error
    if value is None:
        return []
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{where} must be a mapping of options, like port: 8000")
    words = []
    for key, one in value.items():
        flag = f"--{key.replace('_', '-')}"
        if flag in ("--config", "--help"):
            raise ConfigError(f"{where} has {key}, which is for the command line alone")
        if one is not None:
            words += _words(flag, one, flags)
    return words


def _words(flag: str, value: Any, flags: Mapping[str, argparse.Action]) -> list[str]:
    """Written with =, so that no value is taken for a flag."""
    if isinstance(value, bool):
        if isinstance(flags.get(flag), argparse.BooleanOptionalAction):
            return [flag if value else f"--no-{flag[2:]}"]
        return [flag] if value else [f"{flag}=false"]
    if isinstance(value, list) and not any(isinstance(one, list | dict) for one in value):
        return [f"{flag}={one}" for one in value]
    return [f"{flag}={json.dumps(value) if isinstance(value, list | dict) else value}"]
