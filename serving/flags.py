"""Command-line flags and QUIRE_* variables from the fields of a config dataclass: an option is
written once.
"""

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from ..engine.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Unknown flags are answered in one line with the nearest known one; exit code 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"allow_abbrev": False})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is left here, where the flags of the verb are known; a verb's leftovers would
        be reported by the parser above it.
        """
        parsed, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return parsed, left

    def error(self, message: str) -> NoReturn:
        _, _, rest = message.partition("unrecognized arguments: ")
        if rest:
            flag = rest.split()[0].partition("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1)
            kind = "unknown flag" if flag.startswith("-") else "unexpected argument"
            message = f"{kind} {flag}" + (f"; did you mean {near[0]}?" if near else "")
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def add_flags(
    parser: argparse._ActionsContainer, config: type, *, skip: tuple[str, ...] = ()
) -> None:
    """One flag per field of the dataclass, in its order. Values are left out unless given."""
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.name in skip:
            continue
        help_line = f"{field.metadata['help']} (default: {_shown(field.default)})"
        flag = f"--{field.name.replace('_', '-')}"
        if hints[field.name] is bool:
            parser.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=help_line.replace("%", "%%"),
            )
            continue
        kinds = get_args(hints[field.name]) or (hints[field.name],)
        choices = get_args(hints[field.name]) if get_origin(hints[field.name]) is Literal else None
        parser.add_argument(
            flag,
            dest=field.name,
            type=str if choices else _Reader(field.name, kinds, hints[field.name]),
            choices=choices,
            metavar=None if choices else field.metadata.get("metavar") or field.name.upper(),
            default=argparse.SUPPRESS,
            help=help_line.replace("%", "%%"),
        )


def given_options(
    arguments: argparse.Namespace, config: type, environment: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """Field -> value for every option that a flag or a QUIRE_* variable gives; flags win.

    Raises ConfigError naming the variable.
    """
    hints = get_type_hints(config)
    options = {}
    for field in dataclasses.fields(config):
        variable = f"QUIRE_{field.name.upper()}"
        if hasattr(arguments, field.name):
            options[field.name] = getattr(arguments, field.name)
        elif variable in environment:
            text, hint = environment[variable], hints[field.name]
            kinds = (hint,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
            try:
                options[field.name] = _Reader(field.name, kinds, hint)(text)
            except argparse.ArgumentTypeError as error:
                raise ConfigError(f"the variable {variable}: {error}") from error
    return options


class _Reader:
    """Reads a flag's text as the first of its field's types that takes it."""

    def __init__(self, name: str, kinds: tuple[Any, ...], hint: Any) -> None:
        self._name = name
        self._kinds = (hint,) if get_origin(hint) is tuple else kinds

    def __call__(self, text: str) -> Any:
        for kind in self._kinds:
            if get_origin(kind) is tuple:
                parts = [part.strip() for part in text.split(",") if part.strip()]
                read = _Reader(self._name, (get_args(kind)[0],), get_args(kind)[0])
                return tuple(read(part) for part in parts)
            if get_origin(kind) is Literal and text in get_args(kind):
                return text
            if kind is bool and text.lower() in ("1", "true", "yes", "0", "false", "no"):
                return text.lower() in ("1", "true", "yes")
            if kind in (int, float):
                try:
                    return kind(text)
                except ValueError:
                    continue
            if kind is str:
                return text
        words = " or ".join(_kind_words(kind) for kind in self._kinds if kind is not type(None))
        raise argparse.ArgumentTypeError(f"must be {words}, got {text!r}")


def _kind_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a comma-separated list"
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "text")


def _shown(default: Any) -> str:
    if default is None:
        return "chosen"
    if default == ():
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)
