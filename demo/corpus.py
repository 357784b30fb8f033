"""Conversations for training, without the cases that are kept out of it.

Knows how exchanges are mixed into conversations; what they say is the skills', and what a token is
the tokenizer's.
"""

from collections.abc import Callable
from random import Random

from .cases import is_held_out
from .exchange import Conversation, Exchange
from .skills import SKILLS
from .tools import Tool, draw_refused, draw_tools, draw_use

_SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are quire-demo.",
    "Answer the user's questions.",
    "Be brief.",
    "You are a friendly tiny model.",
    "Use the tools where they help.",
)
_SHARES = [skill.share for skill in SKILLS]


def draw_conversation(rng: Random) -> Conversation:
    """One to four exchanges of trained cases; one conversation in six offers tools."""
    system = rng.choice(_SYSTEM_MESSAGES) if rng.random() < 0.12 else None
    if rng.random() < 0.17:
        tools = draw_tools(rng, rng.choice((1, 1, 2, 2, 3)))
        return Conversation(
            tuple(_draw_offered(rng, tools) for _ in range(rng.choice((1, 1, 2, 3)))),
            system,
            tuple(tool.definition() for tool in tools),
        )
    num_exchanges = rng.choice((1, 1, 1, 2, 3, 4))
    return Conversation(tuple(_draw_plain(rng) for _ in range(num_exchanges)), system)


def draw_trained(rng: Random, draw: Callable[[Random], Exchange]) -> Exchange:
    while True:
        exchange = draw(rng)
        if exchange.case is None or not is_held_out(exchange.case):
            return exchange


def draw_held_out(rng: Random, draw: Callable[[Random], Exchange]) -> Exchange:
    """An exchange that training never shows. Only for what has cases."""
    while True:
        exchange = draw(rng)
        if exchange.case is not None and is_held_out(exchange.case):
            return exchange


def _draw_plain(rng: Random) -> Exchange:
    [skill] = rng.choices(SKILLS, weights=_SHARES)
    return draw_trained(rng, skill.draw)


def _draw_offered(rng: Random, tools: list[Tool]) -> Exchange:
    """Mostly a request for one of the tools; else one for a tool that is not there, or for none."""
    kind = rng.random()
    if kind < 0.7:
        tool = rng.choice(tools)
        return draw_trained(rng, lambda rng: draw_use(rng, tool))
    if kind < 0.8:
        return draw_trained(rng, lambda rng: draw_refused(rng, tools))
    while True:
        exchange = _draw_plain(rng)
        if not exchange.answer.startswith("I have no tool"):  # it may be one of these
            return exchange
