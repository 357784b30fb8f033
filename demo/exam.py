"""The exam: cases that training never saw, asked through quire.LLM and marked.

Its draws are fixed. What has no held-out cases (fixed replies, facts) is asked as it was trained,
and says so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from quire import LLM, SamplingParams

from . import arithmetic, copying, replies, words
from .cases import is_held_out
from .corpus import draw_held_out
from .exchange import Conversation, Exchange, has_same_answer
from .replies import draw_unknown
from .skills import draw_story_exchange, is_telling
from .tools import KINDS, draw_refused, draw_tool, draw_tools, draw_use

MAX_TOKENS = 256  # of an answer; stories are the longest
_NUM_OFFERS = 14  # LLM.chat takes one list of tools for all conversations of a call


@dataclass(frozen=True)
class Question:
    """A conversation up to an answer of the assistant, and what marks that answer."""

    messages: tuple[dict[str, Any], ...]
    exchange: Exchange
    is_right: Callable[[Exchange, str], bool] = has_same_answer
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def prompt(self) -> str:
        return self.exchange.prompt


@dataclass(frozen=True)
class Subject:
    """is_held_out: whether training never shows any of its cases. share_to_pass: of right answers;
    None for what is measured only.
    """

    name: str
    questions: tuple[Question, ...]
    is_held_out: bool
    share_to_pass: float | None


@dataclass(frozen=True)
class Mark:
    num_right: int
    num_asked: int
    wrong: tuple[tuple[str, str], ...]  # prompts and what was answered

    @property
    def share(self) -> float:
        return self.num_right / self.num_asked


def draw_exam() -> list[Subject]:
    add, subtract = arithmetic.addition, arithmetic.subtraction
    return [
        Subject("addition", _sums(400, add, arithmetic.ADD_WORDINGS), True, 0.95),
        Subject("subtraction", _sums(400, subtract, arithmetic.SUBTRACT_WORDINGS), True, 0.95),
        Subject("subtraction, -3 to 3", _close_differences(), True, 0.85),
        Subject("count", _held_out(200, arithmetic.draw_count), True, 0.95),
        Subject("repeat unseen words", _asked(200, copying.draw_unseen_repeat), True, 0.95),
        Subject("json", _held_out(200, copying.draw_json), True, 0.95),
        Subject("greeting by name", _held_out(100, copying.draw_greeting), True, 0.95),
        Subject("capital", _every_capital(), False, 1.0),
        Subject("identity", _every_reply(replies.REPLY_BY_PROMPT), False, 1.0),
        Subject("identity, small letters, no marks", _careless_replies(), False, 0.95),
        Subject("korean", _every_korean(), False, 1.0),
        Subject("unknown", _held_out(100, draw_unknown), True, 0.95),
        Subject("story", _stories(50), True, 0.95),
        Subject("tool call", _tool_calls(100), True, 0.95),
        Subject("tool result", _tool_results(100), True, 0.95),
        Subject("no tool for it", _refusals(100), True, 0.95),
        Subject("no tool needed", _with_tools_unneeded(100), True, 0.95),
        Subject(
            "identity, with tools",
            _offering_tools(_every_reply(replies.REPLY_BY_PROMPT)),
            False,
            0.95,
        ),
    ]


def mark(llm: LLM, subject: Subject) -> Mark:
    """Greedy answers, marked."""
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    wrong: list[tuple[str, str]] = []
    by_tools: dict[str, list[Question]] = {}
    for question in subject.questions:
        by_tools.setdefault(repr(question.tools), []).append(question)
    for questions in by_tools.values():
        outputs = llm.chat(
            [question.messages for question in questions],
            params,
            tools=questions[0].tools or None,
            use_tqdm=False,
        )
        for question, output in zip(questions, outputs, strict=True):
            text = output.outputs[0].text
            if not question.is_right(question.exchange, text):
                wrong.append((question.prompt, text))
    num_asked = len(subject.questions)
    return Mark(num_asked - len(wrong), num_asked, tuple(wrong))


def _plain(exchange: Exchange, tools: tuple[dict[str, Any], ...] = ()) -> Question:
    return Question(({"role": "user", "content": exchange.prompt},), exchange, tools=tools)


def _asked(num: int, draw: Callable[[Random], Exchange]) -> tuple[Question, ...]:
    """That many different prompts."""
    rng = Random(f"exam {num}")
    question_by_prompt: dict[str, Question] = {}
    while len(question_by_prompt) < num:
        exchange = draw(rng)
        question_by_prompt.setdefault(exchange.prompt, _plain(exchange))
    return tuple(question_by_prompt.values())


def _held_out(num: int, draw: Callable[[Random], Exchange]) -> tuple[Question, ...]:
    return _asked(num, lambda rng: draw_held_out(rng, draw))


def _sums(
    num: int, make: Callable[[int, int, str], Exchange], wordings: tuple[str, ...]
) -> tuple[Question, ...]:
    """That many pairs, each in three wordings."""
    rng = Random(f"exam {make.__name__}")
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < num:
        a, b = arithmetic.draw_number(rng), arithmetic.draw_number(rng)
        if is_held_out(make(a, b, "").case or ""):
            pairs[a, b] = None
    return tuple(_plain(make(a, b, wording)) for a, b in pairs for wording in wordings[:3])


def _close_differences() -> tuple[Question, ...]:
    """All that are held out, in one wording."""
    wording = arithmetic.SUBTRACT_WORDINGS[0]
    pairs = [(a, b) for a in range(100) for b in range(100) if abs(a - b) <= 3]
    exchanges = [arithmetic.subtraction(a, b, wording) for a, b in pairs]
    return tuple(_plain(e) for e in exchanges if is_held_out(e.case or ""))


def _every_capital() -> tuple[Question, ...]:
    return tuple(
        _plain(replies.capital(country, wording))
        for country in words.CAPITAL_BY_COUNTRY
        for wording in replies.CAPITAL_WORDINGS
    )


def _every_reply(reply_by_prompt: dict[str, str]) -> tuple[Question, ...]:
    return tuple(_plain(Exchange(*item)) for item in reply_by_prompt.items())


def _careless_replies() -> tuple[Question, ...]:
    """In small letters and without the last mark."""
    items = replies.REPLY_BY_PROMPT.items()
    return _every_reply({prompt.lower().rstrip("?!."): answer for prompt, answer in items})


def _every_korean() -> tuple[Question, ...]:
    greetings = [
        _plain(replies.korean_greeting(name, wording))
        for name in words.KOREAN_NAMES
        for wording in replies.KOREAN_GREETING_WORDINGS
    ]
    return (*_every_reply(replies.KOREAN_REPLY_BY_PROMPT), *greetings)


def _stories(num: int) -> tuple[Question, ...]:
    return tuple(
        Question(question.messages, question.exchange, is_telling)
        for question in _held_out(num, draw_story_exchange)
    )


def _tool_calls(num: int) -> tuple[Question, ...]:
    questions = []
    for conversation in _tool_uses("calls", num):
        [exchange] = conversation.exchanges
        assert exchange.call is not None
        expected = Exchange(exchange.prompt, exchange.call.text(), exchange.case)
        questions.append(_plain(expected, conversation.tools))
    return tuple(questions)


def _tool_results(num: int) -> tuple[Question, ...]:
    """Up to the tool's turn; the calls are right ones, and held out as well."""
    return tuple(
        Question(
            tuple(conversation.messages()[:-1]),
            conversation.exchanges[0],
            tools=conversation.tools,
        )
        for conversation in _tool_uses("results", num)
    )


def _tool_uses(part: str, num: int) -> list[Conversation]:
    """Every kind of tool in turn, each of the offers in as many conversations."""
    rng = Random(f"exam tool {part}")
    offers = []
    for i in range(_NUM_OFFERS):
        kind = KINDS[i % len(KINDS)]
        others = [other for other in KINDS if other is not kind]
        tools = [draw_tool(rng, k) for k in (kind, *rng.sample(others, i % 3))]
        rng.shuffle(tools)
        offers.append((next(tool for tool in tools if tool.kind is kind), tools))
    conversations: dict[tuple[str, int], Conversation] = {}
    while len(conversations) < num:
        which = len(conversations) % _NUM_OFFERS
        tool, tools = offers[which]
        exchange = draw_held_out(rng, partial(draw_use, tool=tool))
        definitions = tuple(tool.definition() for tool in tools)
        one = Conversation((exchange,), tools=definitions)
        conversations.setdefault((exchange.prompt, which), one)
    return list(conversations.values())


def _refusals(num: int) -> tuple[Question, ...]:
    """Half of them without tools, half with tools of other kinds."""
    rng = Random("exam refusals")
    questions = list(_held_out(num // 2, lambda rng: draw_refused(rng, [])))
    tools = draw_tools(rng, 2)
    definitions = tuple(tool.definition() for tool in tools)
    others = _held_out(num - num // 2, lambda rng: draw_refused(rng, tools))
    questions += [_plain(question.exchange, definitions) for question in others]
    return tuple(questions)


def _with_tools_unneeded(num: int) -> tuple[Question, ...]:
    draws = (arithmetic.draw_addition, arithmetic.draw_count, copying.draw_greeting,
             copying.draw_json)  # fmt: skip
    asked = [question for draw in draws for question in _held_out(num // len(draws), draw)]
    return _offering_tools(tuple(asked))


def _offering_tools(questions: tuple[Question, ...]) -> tuple[Question, ...]:
    definitions = tuple(tool.definition() for tool in draw_tools(Random("exam offer"), 2))
    return tuple(_plain(question.exchange, definitions) for question in questions)
