"""How large a template may grow what it builds: the meter of one rendering, and what each operator,
method and filter is charged before it builds anything.

Knows sizes and the clock only; where the charges are made is `template_sandbox.py`'s.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, MappingView, Set
from dataclasses import dataclass
from types import BuiltinMethodType
from typing import Any, cast

from ..errors import RequestError

# Work may add up to more than one output: a text that grows by `+` is copied each time.
_MAX_WORK_OUTPUTS = 128
_MAX_INT_BITS = 1 << 14


@dataclass(frozen=True)
class RenderLimits:
    time_s: float = 1.0
    output_bytes: int = 8 << 20


class Meter:
    """What one rendering has used. Characters are counted inside, bytes at the output."""

    def __init__(self, limits: RenderLimits) -> None:
        self._limits = limits
        self._deadline = time.monotonic() + limits.time_s
        self._work_left = limits.output_bytes * _MAX_WORK_OUTPUTS
        self._output_left = limits.output_bytes

    def tick(self) -> None:
        if time.monotonic() > self._deadline:
            raise refuse(f"ran longer than {self._limits.time_s:g} s")

    def charge(self, size: int) -> None:
        """Before building something of that many characters or items."""
        self.tick()
        self._work_left -= size
        if size > self._limits.output_bytes or self._work_left < 0:
            raise self._too_large()

    def charge_text(self, *values: object) -> None:
        """Before writing values out: containers count as their repr."""
        todo = list(values)
        size = 0
        while todo:
            value = todo.pop()
            size += len(value) if isinstance(value, (str, bytes)) else 2
            if isinstance(value, Mapping):
                todo.extend(value.keys())
                todo.extend(value.values())
            elif isinstance(value, (list, tuple, Set, MappingView)):
                todo.extend(cast(Iterable[object], value))
            if size > self._limits.output_bytes:
                raise self._too_large()
        self.charge(size)

    def emit(self, piece: str) -> None:
        self.tick()
        self._output_left -= len(piece.encode("utf-8", "surrogatepass"))
        if self._output_left < 0:
            raise self._too_large()

    def _too_large(self) -> RequestError:
        return refuse(f"makes more than {self._limits.output_bytes} bytes")


def refuse(what: str) -> RequestError:
    way_out = "mend the template or pass another as chat_template"
    return RequestError(f"the chat template {what[:500]}; {way_out}", field="chat_template")


def sum_of_numbers(text: str | bytes) -> int:
    """An upper bound of the widths and precisions in a format string."""
    shown = text if isinstance(text, str) else text.decode("latin-1")
    return sum(int(digits[:18]) for digits in re.findall(r"[0-9]+", shown))


def charge_format(meter: Meter, template: str | bytes, values: Any) -> None:
    if "*" in (template if isinstance(template, str) else template.decode("latin-1")):
        meter.charge(sum(abs(v) for v in values if isinstance(v, int)) if values else 0)
    meter.charge(len(template) + sum_of_numbers(template))
    meter.charge_text(*(values if isinstance(values, tuple) else (values,)))


def charge_bits(num_bits: int) -> None:
    if num_bits > _MAX_INT_BITS:
        raise refuse(f"makes a number of more than {_MAX_INT_BITS} bits")


def charge_product(meter: Meter, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        charge_bits(left.bit_length() + right.bit_length())
    for sequence, times in ((left, right), (right, left)):
        if hasattr(sequence, "__len__") and isinstance(times, int):
            meter.charge(len(sequence) * max(times, 0))


def _charge_replace(meter: Meter, text: Any, old: Any, new: Any) -> None:
    num_found = text.count(old) if old else len(text) + 1
    meter.charge(len(text) + num_found * len(new))


def charge_method(
    meter: Meter, method: BuiltinMethodType, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Charge what a method of a string or number will build; the arguments to call it with."""
    owner, name = method.__self__, method.__name__
    if isinstance(owner, (int, float)):
        meter.charge(
            max((abs(a) for a in (*args, *kwargs.values()) if isinstance(a, int)), default=0)
        )
    if not isinstance(owner, (str, bytes)):
        return args
    if name == "join" and args:
        items = list(args[0])
        meter.charge_text(*items)
        meter.charge(len(owner) * len(items))
        return (items, *args[1:])
    if name == "replace" and len(args) >= 2:
        _charge_replace(meter, owner, args[0], args[1])
    elif name == "expandtabs":
        width = args[0] if args else kwargs.get("tabsize", 8)
        meter.charge(len(owner) * max(width, 1))
    elif name in ("ljust", "rjust", "center", "zfill") and args:
        meter.charge(max(len(owner), args[0]))
    else:
        meter.charge(len(owner))
    return args


def _grows_by_numbers(meter: Meter, value: Any, args: tuple[Any, ...]) -> None:
    """center, indent …: at most every character (or item) becomes as wide as the numbers given."""
    width = sum(abs(int(arg)) for arg in args if isinstance(arg, (int, float)))
    width += sum(len(arg) for arg in args if isinstance(arg, str))
    num_lines = value.count("\n") + 1 if isinstance(value, str) else 1
    meter.charge(num_lines * width)


def _grows_by_join(meter: Meter, value: Any, args: tuple[Any, ...]) -> None:
    meter.charge(len(value) * max((len(a) for a in args if isinstance(a, str)), default=0))


def _grows_by_format(meter: Meter, value: Any, args: tuple[Any, ...]) -> None:
    charge_format(meter, str(value), args)


def _grows_by_replace(meter: Meter, value: Any, args: tuple[Any, ...]) -> None:
    if len(args) >= 2:
        _charge_replace(meter, str(value), str(args[0]), str(args[1]))


FILTER_GROWTH: dict[str, Callable[[Meter, Any, tuple[Any, ...]], None]] = {
    "batch": _grows_by_numbers,
    "center": _grows_by_numbers,
    "format": _grows_by_format,
    "indent": _grows_by_numbers,
    "join": _grows_by_join,
    "replace": _grows_by_replace,
    "slice": _grows_by_numbers,
    "wordwrap": _grows_by_join,
}
