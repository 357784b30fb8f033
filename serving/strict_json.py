"""JSON read strictly: what another reader could take for something else is refused."""

import json
import math
from typing import Any, NoReturn

from ..engine.errors import RequestError

MAX_DEPTH = 128
# The decoder keeps everybody waiting: half a second for a prompt of two million token ids.
MAX_COMMAS = 2 << 20
_MAX_INT_DIGITS = 4300  # Python's own limit


class BadNumber(RequestError):
    """A number that is none, or is too large. bad_number_field() finds where it stands."""


def read_json(content: bytes | str, what: str) -> Any:
    """The value. what: its name in the RequestError that is raised, without a field."""
    try:
        text = content.decode() if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        raise RequestError(f"{what} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    commas = text.count(",")
    if commas > MAX_COMMAS:
        raise RequestError(f"{what} has {commas} commas, at most {MAX_COMMAS} are read; send less")
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise _too_deep(what) from None
    except json.JSONDecodeError as error:
        raise RequestError(
            f"{what} is not JSON: {error.msg} at character {error.pos}; send one value"
        ) from None
    except RequestError:
        raise
    except ValueError:  # of more than _MAX_INT_DIGITS
        raise BadNumber(
            f"{what} has an integer of thousands of digits; 64 bits are the most that is used"
        ) from None
    # Fewer brackets cannot be deeper: most values are not walked.
    if text.count("{") + text.count("[") > MAX_DEPTH:
        _check_depth(value, what)
    return value


def read_object(content: bytes | str, what: str) -> dict[str, Any]:
    """The value, which must be an object."""
    value = read_json(content, what)
    if not isinstance(value, dict):
        raise RequestError(
            f"{what} must be a JSON object, got {_KINDS[type(value)]}; write it in braces"
        )
    return value


def bad_number_field(content: bytes) -> str | None:
    """The name of an object's field for which read_object() raised BadNumber; None if other things
    are wrong besides. Read again: where it is raised, the name is not known.
    """
    try:
        fields = _LENIENT.decode(content.decode())
    except (ValueError, RecursionError):
        return None
    if isinstance(fields, dict):
        for name, value in fields.items():
            if _has_bad_number(value):
                return str(name)
    return None


def _has_bad_number(value: object) -> bool:
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, float) and not math.isfinite(one):
            return True
        if isinstance(one, dict | list):
            left += one.values() if isinstance(one, dict) else one
    return False


_KINDS = {
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _check_depth(value: object, what: str) -> None:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [
            child
            for item in containers
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    if any(isinstance(item, dict | list) for item in level):
        raise _too_deep(what)


def _too_deep(what: str) -> RequestError:
    return RequestError(f"{what} is nested deeper than {MAX_DEPTH} levels; flatten it")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise RequestError(f"the key {name!r:.80} stands twice in one object; keep one")
            seen.add(name)
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise BadNumber(f"the number {text:.40} is too large; write it within 64 bits")
    return number


def _no_constant(name: str) -> NoReturn:
    raise BadNumber(f"{name} is not a JSON number; write a finite one")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_distinct, parse_float=_finite, parse_constant=_no_constant
)
_LENIENT = json.JSONDecoder(
    parse_int=lambda text: math.inf if len(text) > _MAX_INT_DIGITS else 0, parse_float=float
)
