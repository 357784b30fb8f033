"""Conversations for training, and the cases that are kept out of it.

Knows how exchanges are mixed into conversations; what they say is the skills', and what a token is
the tokenizer's.
"""

import hashlib
from dataclasses import dataclass
from random import Random

from .skills import SKILLS, Exchange, Skill

_SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are quire-demo.",
    "Answer the user's questions.",
    "Be brief.",
    "You are a friendly tiny model.",
)


@dataclass(frozen=True)
class Conversation:
    exchanges: tuple[Exchange, ...]
    system: str | None = None

    def messages(self) -> list[dict[str, str]]:
        listed = [] if self.system is None else [{"role": "system", "content": self.system}]
        for exchange in self.exchanges:
            listed.append({"role": "user", "content": exchange.prompt})
            listed.append({"role": "assistant", "content": exchange.answer})
        return listed


def is_held_out(case: str) -> bool:
    """Whether a case is never trained: one in ten, by its hash, whatever the seed."""
    digest = hashlib.blake2b(case.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % 10 == 0


def draw_conversation(rng: Random) -> Conversation:
    """One to four exchanges of trained cases, of any skills; sometimes a system message."""
    num_exchanges = rng.choice((1, 1, 1, 2, 3, 4))
    shares = [skill.share for skill in SKILLS]
    skills = rng.choices(SKILLS, weights=shares, k=num_exchanges)
    system = rng.choice(_SYSTEM_MESSAGES) if rng.random() < 0.1 else None
    return Conversation(tuple(draw_trained(skill, rng) for skill in skills), system)


def draw_trained(skill: Skill, rng: Random) -> Exchange:
    while True:
        exchange = skill.draw(rng)
        if exchange.case is None or not is_held_out(exchange.case):
            return exchange


def draw_held_out(skill: Skill, rng: Random, num_tries: int = 1000) -> Exchange | None:
    """An exchange that training never shows; None for a skill that holds nothing out."""
    for _ in range(num_tries):
        exchange = skill.draw(rng)
        if exchange.case is not None and is_held_out(exchange.case):
            return exchange
    return None
