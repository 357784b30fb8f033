"""What is said: exchanges of a user and the assistant, and skills that draw and mark them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any


@dataclass(frozen=True)
class ToolCall:
    """What the assistant asks for before it answers. result: what the tool says, a JSON text."""

    name: str
    arguments: Mapping[str, str | int]
    result: str

    def text(self) -> str:
        call = {"name": self.name, "arguments": dict(self.arguments)}
        return f"<tool_call>{json.dumps(call, ensure_ascii=False)}</tool_call>"

    def message(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": dict(self.arguments)}
        call = {"type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}


@dataclass(frozen=True)
class Exchange:
    """One question and its answer. case: what is kept out of training as a whole, in all wordings;
    None where every case is trained (a fact or a fixed reply cannot be guessed).
    """

    prompt: str
    answer: str
    case: str | None = None
    call: ToolCall | None = None


@dataclass(frozen=True)
class Conversation:
    """tools: functions, in OpenAI's form, that the system turn offers."""

    exchanges: tuple[Exchange, ...]
    system: str | None = None
    tools: tuple[dict[str, Any], ...] = field(default=())

    def messages(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = []
        if self.system is not None:
            listed.append({"role": "system", "content": self.system})
        for exchange in self.exchanges:
            listed.append({"role": "user", "content": exchange.prompt})
            if exchange.call is not None:
                listed.append(exchange.call.message())
                listed.append({"role": "tool", "content": exchange.call.result})
            listed.append({"role": "assistant", "content": exchange.answer})
        return listed


@dataclass(frozen=True)
class Skill:
    """share: of the exchanges drawn. is_right compares an exchange with the text of an answer."""

    name: str
    share: float
    draw: Callable[[Random], Exchange]
    is_right: Callable[[Exchange, str], bool]


def has_same_answer(exchange: Exchange, text: str) -> bool:
    return text.strip() == exchange.answer


def typed_carelessly(rng: Random, prompt: str) -> str:
    """Now and then without its last mark, and with a small first letter."""
    if rng.random() < 0.2:
        prompt = prompt.rstrip(".?!")
    if rng.random() < 0.2:
        prompt = prompt[0].lower() + prompt[1:]
    return prompt
