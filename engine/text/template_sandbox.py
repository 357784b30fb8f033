"""Runs Jinja templates that are not trusted, with the extras that Hugging Face templates expect.

Knows Jinja; does not know messages. A template is a program, so it is metered: every loop turn,
call, filter and operator looks at the clock, and nothing is built whose size, predicted before
building it, is over the limit. No thread, signal or trace function is involved, so nothing is left
behind.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from types import BuiltinMethodType
from typing import Any, cast

import jinja2
from jinja2 import nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from ..errors import RequestError
from .template_meter import (
    FILTER_GROWTH,
    Meter,
    RenderLimits,
    charge_bits,
    charge_format,
    charge_method,
    charge_product,
    refuse,
    sum_of_numbers,
)

MAX_SOURCE_CHARS = 1 << 20
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,  # RecursionError too
    SyntaxError,  # of the Python that Jinja makes
    TypeError,
    ValueError,
)


def compile_template(source: str) -> jinja2.Template:
    """Raises RequestError (field chat_template) with the line."""
    if len(source) > MAX_SOURCE_CHARS:
        raise refuse(f"has {len(source)} characters, at most {MAX_SOURCE_CHARS} are allowed")
    try:
        return _ENVIRONMENT.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise refuse(f"is not valid Jinja: line {error.lineno}: {error.message}") from error
    except _TEMPLATE_FAULTS as error:
        raise refuse(f"cannot be compiled: {type(error).__name__}: {error}") from error


def run_template(template: jinja2.Template, variables: dict[str, Any], limits: RenderLimits) -> str:
    """variables: JSON's own types only. Raises RequestError (field chat_template)."""
    context = cast(_MeteredContext, template.new_context(variables))
    context.meter = Meter(limits)
    pieces: list[str] = []
    try:
        for piece in template.root_render_func(context):
            context.meter.emit(piece)
            pieces.append(piece)
    except RequestError:
        raise
    except _TEMPLATE_FAULTS as error:
        raise refuse(f"failed: {type(error).__name__}: {error}") from error
    return "".join(pieces)


class _MeteredContext(Context):
    meter: Meter

    def derived(self, locals: dict[str, Any] | None = None) -> Context:
        context = cast(_MeteredContext, super().derived(locals))
        context.meter = self.meter
        return context


class _Extras(Extension):
    """{% generation %}: marks the assistant's text for training; here it only writes its body."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _MeteringTransformer(NodeTransformer):
    """Puts every loop and every `~` through a metered filter."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _metered_filter_node("metered loop", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        operands = nodes.List(node.nodes, lineno=node.lineno)
        return _metered_filter_node("metered concat", operands)


def _metered_filter_node(name: str, value: nodes.Node) -> nodes.Filter:
    return nodes.Filter(cast(nodes.Expr, value), name, [], [], None, None, lineno=value.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    context_class = _MeteredContext
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return cast(nodes.Template, _MeteringTransformer().visit(tree))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, (str, bytes)) and attr in ("translate", "maketrans"):
            return False  # grows a text by a table
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        meter = cast(_MeteredContext, context).meter
        meter.tick()
        if isinstance(obj, BuiltinMethodType):
            args = charge_method(meter, obj, args, kwargs)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = cast(_MeteredContext, context).meter
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            meter.charge(len(left) + len(right))
        elif operator == "*":
            charge_product(meter, left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            charge_bits(left.bit_length() * max(right, 0))
        elif operator == "%" and isinstance(left, (str, bytes)):
            charge_format(meter, left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        template = str(value.__self__)
        is_map = value.__name__ == "format_map"

        @pass_context
        def metered_format(context: _MeteredContext, *args: Any, **kwargs: Any) -> str:
            formatter = _MeteredFormatter(self, context.meter)
            if is_map:
                return formatter.vformat(template, (), dict(args[0]))
            return formatter.vformat(template, args, kwargs)

        return metered_format


class _MeteredFormatter(SandboxedFormatter):
    def __init__(self, environment: jinja2.Environment, meter: Meter) -> None:
        super().__init__(environment)
        self._meter = meter

    def format_field(self, value: Any, format_spec: str) -> Any:
        self._meter.charge(sum_of_numbers(format_spec))
        self._meter.charge_text(value)
        return super().format_field(value, format_spec)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        self._meter.charge_text(value)
        return super().convert_field(value, conversion)


class _Namespace(Namespace):
    """Jinja's, without names that reach into Python, and without a repr that could be huge."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        Namespace.__init__(self)
        for name, value in attributes.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"the namespace name {name!r} begins with _")
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<namespace>"


@pass_context
def _finalize(context: _MeteredContext, value: Any) -> Any:
    context.meter.charge_text(value)
    return value


@pass_context
def _metered_loop(context: _MeteredContext, iterable: Iterable[Any]) -> Iterator[Any]:
    for item in iterable:
        context.meter.tick()
        yield item


@pass_context
def _metered_concat(context: _MeteredContext, values: list[Any]) -> str:
    context.meter.charge_text(*values)
    return "".join(map(str, values))


def _bounded_concat(pieces: Iterable[str]) -> str:
    """Joins the output of macros and set blocks, which was not yet seen by `emit`."""
    pieces = list(pieces)
    if sum(map(len, pieces)) > RenderLimits.output_bytes:
        raise refuse(f"makes more than {RenderLimits.output_bytes} bytes")
    return "".join(pieces)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter escapes it for HTML."""
    if indent is not None and len(indent if isinstance(indent, str) else range(indent)) > 16:
        raise refuse("calls tojson with an indent over 16")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: object) -> None:
    raise RequestError(
        f"the chat template refuses these messages: {message!s:.500}", field="messages"
    )


def _strftime_now(format: str) -> str:
    if len(format) > 256 or re.search(r"[0-9]", format):
        raise refuse("calls strftime_now with a format that is long or has digits in it")
    return datetime.now().strftime(format)


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """A function, not the class: methods of the class would change the caller's objects."""
    return dict(*args, **kwargs)


def _metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Charge what goes in, and for the filters that grow it what comes out, then call it."""
    wants = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @functools.wraps(function)
    def metered(context: _MeteredContext, value: Any = "", *args: Any, **kwargs: Any) -> Any:
        if name == "join" and not isinstance(value, (str, list, tuple)):
            value = list(value)
        context.meter.charge_text(value, *args, *kwargs.values())
        growth = FILTER_GROWTH.get(name)
        if growth is not None:
            growth(context.meter, value, (*args, *kwargs.values()))
        passed = {
            "context": (context,),
            "eval_context": (context.eval_ctx,),
            "environment": (context.environment,),
        }.get(wants or "", ())
        return function(*passed, value, *args, **kwargs)

    return cast(Callable[..., Any], pass_context(metered))


def _make_environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Extras, loopcontrols],
        finalize=_finalize,
    )
    environment.concat = _bounded_concat  # type: ignore[method-assign]
    environment.filters["tojson"] = _tojson
    for name in ("urlize", "pprint", "xmlattr", "random"):
        del environment.filters[name]  # of no use in a prompt, and hard to bound
    for name, function in environment.filters.items():
        environment.filters[name] = _metered_filter(name, function)
    environment.filters["metered loop"] = _metered_loop
    environment.filters["metered concat"] = _metered_concat
    del environment.globals["lipsum"]
    environment.globals |= {
        "dict": _new_dict,
        "namespace": _Namespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment


_ENVIRONMENT = _make_environment()
