"""Command-line flags and QUIRE_* variables from the fields of a config dataclass: an option is
written once.
"""

import argparse
import copy
import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from ..engine.errors import ConfigError

TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")

Translate = Callable[[Sequence[str], Mapping[str, argparse.Action]], Sequence[str]]


class Parser(argparse.ArgumentParser):
    """Unknown flags are answered in one line with the nearest known one; exit code 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"allow_abbrev": False})
        self.translate: Translate | None = None  # of arguments, before they are read

    @property
    def flags(self) -> Mapping[str, argparse.Action]:
        """Every spelling of every flag."""
        return self._option_string_actions

    @classmethod
    def speaking_of(cls, other: "Parser", prog: str) -> "Parser":
        """The same, with another name in what it says."""
        parser = copy.copy(other)
        parser.prog = prog
        return parser

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is left here, where the flags of the verb are known; a verb's leftovers would
        be reported by the parser above it.
        """
        if self.translate is not None:
            args = self.translate(args, self.flags)
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
    """One flag per field of the dataclass, in its order. Values are left out unless given.

    A field's metadata: help; metavar; unset, the word for a default of None; is_secret, for values
    that are neither shown nor split; fallback, a second variable.
    """
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.name in skip:
            continue
        hint = hints[field.name]
        help_line = f"{field.metadata['help']} (default: {_shown(field)})".replace("%", "%%")
        flag = f"--{field.name.replace('_', '-')}"
        if hint is bool:
            parser.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=help_line,
            )
            continue
        choices = get_args(hint) if get_origin(hint) is Literal else None
        parser.add_argument(
            flag,
            dest=field.name,
            action=Collect if _is_list(hint) else "store",
            type=str.lower if choices else _reader(field, hint),
            choices=choices,
            metavar=None if choices else field.metadata.get("metavar") or field.name.upper(),
            default=argparse.SUPPRESS,
            help=help_line,
        )


def given_options(
    arguments: argparse.Namespace, config: type, environment: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """Field -> value for every option that a flag, its QUIRE_* variable or its fallback variable
    gives; the first of these wins. Raises ConfigError naming the variable.
    """
    hints = get_type_hints(config)
    options = {}
    for field in dataclasses.fields(config):
        if hasattr(arguments, field.name):
            options[field.name] = getattr(arguments, field.name)
            continue
        variable = variable_of(field, environment)
        if variable is not None:
            try:
                options[field.name] = _reader(field, hints[field.name])(environment[variable])
            except argparse.ArgumentTypeError as error:
                raise ConfigError(f"the variable {variable}: {error}") from error
    return options


def variable_of(field: dataclasses.Field[Any], environment: Mapping[str, str]) -> str | None:
    """The variable that gives the field, if one does."""
    names = [f"QUIRE_{field.name.upper()}"]
    if fallback := field.metadata.get("fallback"):
        names.append(fallback)
    # An empty variable is how scripts spell none; an empty key would be no key at all.
    is_secret = field.metadata.get("is_secret")
    return next((n for n in names if environment.get(n) or (is_secret and n in environment)), None)


class Collect(argparse.Action):
    """A list: what the flag gives each time it is there, one after the other."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), *values))


def _reader(field: dataclasses.Field[Any], hint: Any) -> Callable[[str], Any]:
    """What makes a value of the field out of text."""
    if field.metadata.get("is_secret"):
        return _one_secret if _is_list(hint) else str
    return _Reader(_kinds(hint))


def is_secret(action: argparse.Action) -> bool:
    """Whether the flag's values may be shown to nobody."""
    return action.type is _one_secret


def _one_secret(text: str) -> tuple[str, ...]:
    """Not split: a key may hold commas."""
    return (text,)


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types of a field that may have one of several."""
    return (hint,) if get_origin(hint) in (Literal, tuple) else get_args(hint) or (hint,)


def _is_list(hint: Any) -> bool:
    return any(get_origin(kind) is tuple for kind in _kinds(hint))


class _Reader:
    """Reads a flag's text as the first of its field's types that takes it."""

    def __init__(self, kinds: tuple[Any, ...]) -> None:
        self._kinds = kinds

    def __call__(self, text: str) -> Any:
        for kind in self._kinds:
            if get_origin(kind) is tuple:
                parts = [part.strip() for part in text.split(",") if part.strip()]
                read = _Reader((get_args(kind)[0],))
                return tuple(read(part) for part in parts)
            if get_origin(kind) is Literal and text.lower() in get_args(kind):
                return text.lower()
            if kind is bool and text.lower() in TRUE + FALSE:
                return text.lower() in TRUE
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


def _shown(field: dataclasses.Field[Any]) -> str:
    if field.default is None:
        return str(field.metadata.get("unset", "chosen"))
    if field.default == ():
        return "none"
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
