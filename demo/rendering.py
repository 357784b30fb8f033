"""A conversation as text, cut into what is given and what the assistant says.

chat_template.jinja in Python, since the trainer renders thousands of conversations a minute; a test
holds the two equal.
"""

import json
from typing import Any

from .exchange import Conversation, Exchange

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"


def pieces_of(conversation: Conversation) -> list[tuple[str, bool]]:
    """Alternately given and the assistant's; joined, the rendered conversation without its last
    newline. Cuts follow a newline, which no token spans.
    """
    pieces: list[tuple[str, bool]] = []
    given = _system_turn(conversation.system, conversation.tools)
    for exchange in conversation.exchanges:
        given += _turn("user", exchange.prompt)
        for said, then in _said(exchange):
            given += f"{TURN_START}assistant\n"
            pieces += [(given, False), (said + TURN_END, True)]
            given = "\n" + then
    return pieces


def _said(exchange: Exchange) -> list[tuple[str, str]]:
    """What the assistant says, and the turns of others that follow."""
    if exchange.call is None:
        return [(exchange.answer, "")]
    return [(exchange.call.text(), _turn("tool", exchange.call.result)), (exchange.answer, "")]


def _system_turn(system: str | None, tools: tuple[dict[str, Any], ...]) -> str:
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    offer = "\n".join(["Tools:", *lines]) if tools else None
    parts = [part for part in (system, offer) if part is not None]
    return _turn("system", "\n\n".join(parts)) if parts else ""


def _turn(role: str, content: str) -> str:
    return f"{TURN_START}{role}\n{content.strip()}{TURN_END}\n"
