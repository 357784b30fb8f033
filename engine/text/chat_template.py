"""Renders conversations with chat templates.

Knows messages and how a template reads them; does not know where a template came from or what a
token is. That a template is a program, and what it may do, is `template_sandbox.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

from ..errors import RequestError
from .template_meter import RenderLimits
from .template_sandbox import compile_template, run_template

_TOOLS = re.compile(r"\btools\b")
_CONTINUE = "\ue000CONTINUE\ue001 "  # the trailing space tells whether the template trims
_LOOPS_OVER_PARTS = re.compile(r"\bfor\s+\w+\s+in\s+[^%}]*\bcontent\b")
_DEFAULT_LIMITS = RenderLimits()

# Variables that the engine gives; whoever passes variables of a stranger on refuses these.
RESERVED_VARIABLES = (
    "self",
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
)


class ChatTemplate:
    """A compiled template; rendering is thread-safe. Get it from `compile_chat_template`."""

    def __init__(self, source: str, limits: RenderLimits) -> None:
        self._limits = limits
        self._keeps_parts = _LOOPS_OVER_PARTS.search(source) is not None
        self.reads_tools = _TOOLS.search(source) is not None
        self._template = compile_template(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        chat = _checked_messages(messages, keep_parts=self._keeps_parts)
        if continue_final_message:
            if add_generation_prompt:
                raise RequestError(
                    "continue_final_message and add_generation_prompt exclude each other; set "
                    "add_generation_prompt to false to continue the last message",
                    field="continue_final_message",
                )
            _mark_final_message(chat)
        text = run_template(
            self._template,
            {
                "documents": None,
                **_plain_dict(variables or {}, "chat_template_kwargs"),
                "messages": chat,
                "tools": _checked_tools(tools),
                "add_generation_prompt": add_generation_prompt,
            },
            self._limits,
        )
        return _cut_at_mark(text) if continue_final_message else text


@lru_cache(maxsize=64)
def compile_chat_template(source: str, limits: RenderLimits = _DEFAULT_LIMITS) -> ChatTemplate:
    """Compiling takes milliseconds, so the last 64 templates are kept."""
    return ChatTemplate(source, limits)


def _checked_messages(messages: object, *, keep_parts: bool) -> list[dict[str, Any]]:
    """Plain copies: a template cannot reach, or change, an object of the caller."""
    if not isinstance(messages, (list, tuple)) or not messages:
        shown = "an empty list" if messages == [] else type(messages).__name__
        raise RequestError(
            f"messages must be a non-empty list of {{role, content}}, got {shown}", field="messages"
        )
    chat = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise RequestError(
                f"{where} must be an object with a role and a content, got "
                f"{type(message).__name__}",
                field=where,
            )
        plain = _plain_dict(message, where)
        if not isinstance(plain.get("role"), str):
            raise RequestError(
                f'{where}.role must be a string such as "user", got {plain.get("role")!r}',
                field=f"{where}.role",
            )
        if "content" in plain:
            plain["content"] = _checked_content(plain["content"], f"{where}.content", keep_parts)
        chat.append(plain)
    return chat


def _checked_content(content: object, where: str, keep_parts: bool) -> object:
    """Text parts are joined by newlines unless the template loops over the parts itself."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(
            f"{where} must be a string or a list of text parts, got {type(content).__name__}",
            field=where,
        )
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            raise RequestError(
                f'{where}[{index}] must be {{"type": "text", "text": …}}, got type {kind!r}; only '
                "text is understood",
                field=f"{where}[{index}]",
            )
        texts.append(text)
    return content if keep_parts else "\n".join(texts)


def _checked_tools(tools: object) -> list[Any] | None:
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(t, Mapping) for t in tools):
        raise RequestError(
            f"tools must be a list of JSON objects that describe functions, got {tools!r:.80}",
            field="tools",
        )
    return cast(list[Any], _plain(tools, "tools"))


def _plain_dict(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    return cast(dict[str, Any], _plain(value, where))


def _plain(value: object, where: str) -> object:
    """The value rebuilt from JSON's own types: others have methods that a sandbox does not know."""
    try:
        return _rebuilt(value, 0)
    except _NotPlain as error:
        # The path is made of keys of the caller's, as many and as long as he likes.
        field = (where + "".join(reversed(error.path)))[:80]
        raise RequestError(f"{field} {error}", field=field) from None


class _NotPlain(Exception):
    """path: of what is wrong, from the inside out."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.path: list[str] = []


def _rebuilt(value: object, depth: int) -> object:
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if depth > 128:
        raise _NotPlain("is nested deeper than 128 levels")
    if isinstance(value, Mapping):
        made = {}
        for key, one in value.items():
            if not isinstance(key, str):
                raise _NotPlain(f"has the key {key!r:.80}; keys are strings")
            try:
                made[str(key)] = _rebuilt(one, depth + 1)
            except _NotPlain as error:
                error.path.append(f".{key[:40]}")
                raise
        return made
    if isinstance(value, (list, tuple)):
        items = []
        for index, one in enumerate(value):
            try:
                items.append(_rebuilt(one, depth + 1))
            except _NotPlain as error:
                error.path.append(f"[{index}]")
                raise
        return items
    raise _NotPlain(
        f"is a {type(value).__name__}; use strings, numbers, booleans, null, lists and objects"
    )


def _mark_final_message(chat: list[dict[str, Any]]) -> None:
    final = chat[-1]
    content = final.get("content")
    if isinstance(content, str):
        final["content"] = content + _CONTINUE
    elif isinstance(content, list) and content:
        content[-1]["text"] += _CONTINUE
    else:
        raise RequestError(
            "continue_final_message needs a text to continue, but the content of "
            f"messages[{len(chat) - 1}] is {content!r}; give the beginning of the answer as its "
            "content",
            field="continue_final_message",
        )


def _cut_at_mark(text: str) -> str:
    start = text.rfind(_CONTINUE.strip())
    if start < 0:
        raise RequestError(
            "continue_final_message is impossible here: the chat template leaves the last "
            "message out; use a template that writes it",
            field="continue_final_message",
        )
    return text[:start] if text.startswith(_CONTINUE, start) else text[:start].rstrip()
