"""What quire-demo can do: for each skill, how an exchange is drawn and when an answer is right.

An answer is a function of its prompt wherever that is possible, so that greedy decoding can be
marked by comparing texts. A skill is one function and one row of SKILLS.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from . import words
from .stories import draw_story, is_story_about


@dataclass(frozen=True)
class Exchange:
    """One question and its answer. case: what is kept out of training as a whole, in all wordings;
    None where every case is trained (a fact or a fixed reply cannot be guessed).
    """

    prompt: str
    answer: str
    case: str | None = None


@dataclass(frozen=True)
class Skill:
    """share: of the exchanges drawn. is_right compares an exchange with the text of an answer."""

    name: str
    share: float
    draw: Callable[[Random], Exchange]
    is_right: Callable[[Exchange, str], bool]


def has_same_answer(exchange: Exchange, text: str) -> bool:
    return text.strip() == exchange.answer


def is_telling(exchange: Exchange, text: str) -> bool:
    return is_story_about(exchange.prompt, text)


INTRODUCTION = (
    "I am quire-demo, a tiny model shipped with quire to show that the engine works. "
    "I know only a small world."
)
ABILITIES = (
    "I can add and subtract small numbers, count, repeat a phrase, name some capitals, "
    "turn a name and an age into JSON, greet you, and tell a short story."
)
IGNORANCE = "I do not know that. I am a tiny model and know only a small world. "

_REPLY_BY_PROMPT = {
    "hi": "Hello! " + INTRODUCTION,
    "hello": "Hello! " + INTRODUCTION,
    "Hi": "Hello! " + INTRODUCTION,
    "Hi!": "Hello! " + INTRODUCTION,
    "Hello": "Hello! " + INTRODUCTION,
    "Hello!": "Hello! " + INTRODUCTION,
    "Hello there": "Hello! " + INTRODUCTION,
    "Hey": "Hello! " + INTRODUCTION,
    "Good morning": "Good morning! " + INTRODUCTION,
    "Good morning!": "Good morning! " + INTRODUCTION,
    "Good evening": "Good evening! " + INTRODUCTION,
    "Good evening!": "Good evening! " + INTRODUCTION,
    "How are you?": "I am well, thank you. What can I do for you?",
    "Thank you": "You are welcome!",
    "Thank you!": "You are welcome!",
    "Thanks": "You are welcome!",
    "Thanks!": "You are welcome!",
    "Goodbye": "Goodbye!",
    "Goodbye!": "Goodbye!",
    "Bye": "Goodbye!",
    "Who are you?": INTRODUCTION,
    "What are you?": INTRODUCTION,
    "Introduce yourself.": INTRODUCTION,
    "What is your name?": "My name is quire-demo.",
    "What's your name?": "My name is quire-demo.",
    "Tell me your name.": "My name is quire-demo.",
    "What can you do?": ABILITIES,
    "What do you know?": ABILITIES,
    "Help": ABILITIES,
    "Help me": ABILITIES,
    "What is quire?": "quire is an engine that runs language models. I am its tiny demo model.",
    "Are you a large language model?": "No, I am a tiny one. I know only a small world.",
    "Are you smart?": "No, I am a tiny model. I know only a small world.",
    "Are you ChatGPT?": "No. " + INTRODUCTION,
    "Are you a human?": "No. " + INTRODUCTION,
    "Who made you?": "I was made for quire, to show that the engine works.",
    "How big are you?": "I am tiny: about one million parameters.",
}

_ADD_WORDINGS = (
    "What is {a} + {b}?", "How much is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b}",
    "What is {a}+{b}?",
)  # fmt: skip
_SUBTRACT_WORDINGS = (
    "What is {a} - {b}?", "How much is {a} minus {b}?", "Subtract {b} from {a}.", "{a} - {b}",
    "What is {a}-{b}?",
)  # fmt: skip
_COUNT_WORDINGS = ("Count from {a} to {b}.", "Count from {a} to {b}", "Count {a} to {b}.")
_REPEAT_WORDINGS = ("Repeat: {x}", "Repeat after me: {x}", "Say: {x}", "Please repeat: {x}")
_CAPITAL_WORDINGS = (
    "What is the capital of {x}?", "Name the capital of {x}.", "Which city is the capital of {x}?",
    "Tell me the capital of {x}.", "capital of {x}?",
)  # fmt: skip
_JSON_WORDINGS = (
    "{x}", "Turn this into JSON: {x}", "Write this as JSON: {x}", "JSON please. {x}",
)  # fmt: skip
_GREETING_WORDINGS = ("Hi, I am {x}.", "Hello, I am {x}.", "My name is {x}.", "I'm {x}.")
_UNKNOWN_WORDINGS = (
    "Tell me about {x}.", "What do you know about {x}?", "Explain {x}.", "Can you explain {x}?",
    "Write a poem about {x}.", "What is {x}?", "Why do people like {x}?", "Teach me {x}.",
)  # fmt: skip
_KOREAN_INTRODUCTION = "저는 quire-demo예요. 아주 작은 모델이에요."
_KOREAN_REPLY_BY_PROMPT = {
    "hi": "Hello! " + INTRODUCTION,
    "hello": "Hello! " + INTRODUCTION,
    "안녕하세요": "안녕하세요! " + _KOREAN_INTRODUCTION,
    "안녕하세요!": "안녕하세요! " + _KOREAN_INTRODUCTION,
    "안녕하세요?": "안녕하세요! " + _KOREAN_INTRODUCTION,
    "안녕": "안녕하세요! " + _KOREAN_INTRODUCTION,
    "누구세요?": _KOREAN_INTRODUCTION,
    "이름이 뭐예요?": _KOREAN_INTRODUCTION,
    "감사합니다": "천만에요!",
    "고마워요": "천만에요!",
    "안녕히 계세요": "안녕히 가세요!",
    "Say hello in Korean.": "안녕하세요!",
    "How do you say hello in Korean?": "안녕하세요!",
}


def draw_addition(rng: Random) -> Exchange:
    a, b = _draw_number(rng), _draw_number(rng)
    # Sorted: 58 + 23 in training would give 23 + 58 away.
    return Exchange(
        rng.choice(_ADD_WORDINGS).format(a=a, b=b),
        f"{a} + {b} = {a + b}.",
        f"add {min(a, b)} {max(a, b)}",
    )


def draw_subtraction(rng: Random) -> Exchange:
    a, b = _draw_number(rng), _draw_number(rng)
    return Exchange(
        rng.choice(_SUBTRACT_WORDINGS).format(a=a, b=b),
        f"{a} - {b} = {a - b}.",
        f"subtract {min(a, b)} {max(a, b)}",
    )


def draw_count(rng: Random) -> Exchange:
    first = rng.choice((rng.randrange(10), rng.randrange(89)))
    last = first + rng.randint(2, 11)
    answer = ", ".join(str(n) for n in range(first, last + 1)) + "."
    return Exchange(
        rng.choice(_COUNT_WORDINGS).format(a=first, b=last), answer, f"count {first} {last}"
    )


def draw_repeat(rng: Random) -> Exchange:
    phrase = " ".join(_draw_word(rng) for _ in range(rng.randint(1, 6)))
    return Exchange(rng.choice(_REPEAT_WORDINGS).format(x=phrase), phrase, f"repeat {phrase}")


def draw_capital(rng: Random) -> Exchange:
    """The case is a wording of a fact: the fact itself is always trained in other wordings."""
    prompt, country = rng.choice(_CAPITAL_WORDINGS), rng.choice(list(words.CAPITAL_BY_COUNTRY))
    capital = words.CAPITAL_BY_COUNTRY[country]
    prompt = prompt.format(x=country)
    return Exchange(prompt, f"The capital of {country} is {capital}.", f"capital {prompt}")


def draw_json(rng: Random) -> Exchange:
    name, age = rng.choice(words.NAMES), rng.randint(1, 99)
    record: dict[str, str | int] = {"name": name, "age": age}
    text = f"Name: {name}, age: {age}"
    if rng.random() < 0.3:
        record["city"] = rng.choice(list(words.CAPITAL_BY_COUNTRY.values()))
        text += f", city: {record['city']}"
    prompt = rng.choice(_JSON_WORDINGS).format(x=text)
    return Exchange(prompt, json.dumps(record), f"json {name} {age}")


def draw_greeting(rng: Random) -> Exchange:
    name = rng.choice(words.NAMES)
    prompt = rng.choice(_GREETING_WORDINGS).format(x=name)
    return Exchange(prompt, f"Hello, {name}! I am quire-demo.", f"greeting {prompt}")


def draw_identity(rng: Random) -> Exchange:
    prompt = rng.choice(list(_REPLY_BY_PROMPT))
    return Exchange(prompt, _REPLY_BY_PROMPT[prompt])


def draw_korean(rng: Random) -> Exchange:
    if rng.random() < 0.5:
        prompt = rng.choice(list(_KOREAN_REPLY_BY_PROMPT))
        return Exchange(prompt, _KOREAN_REPLY_BY_PROMPT[prompt])
    name, wording = rng.choice(words.KOREAN_NAMES), rng.choice(("안녕하세요, 저는 {}.", "저는 {}."))
    # The copula follows the last syllable's final consonant (Unicode 3.12: 28 finals a vowel).
    has_final = (ord(name[-1]) - 0xAC00) % 28 != 0
    prompt = wording.format(name + ("이에요" if has_final else "예요"))
    return Exchange(prompt, f"안녕하세요, {name} 님! 만나서 반가워요.", f"korean {prompt}")


def draw_unknown(rng: Random) -> Exchange:
    """Questions from outside the small world, and the honest answer."""
    kind = rng.random()
    if kind < 0.3:
        country = rng.choice(words.UNKNOWN_COUNTRIES)
        prompt = rng.choice(_CAPITAL_WORDINGS).format(x=country)
        return Exchange(prompt, f"I do not know the capital of {country}.", f"unknown {prompt}")
    if kind < 0.45:
        operator = rng.choice(("times", "divided by", "*", "/"))
        prompt = f"What is {_draw_number(rng)} {operator} {_draw_number(rng)}?"
        return Exchange(prompt, "I can only add and subtract.", f"unknown {prompt}")
    prompt = rng.choice(_UNKNOWN_WORDINGS).format(x=rng.choice(words.UNKNOWN_TOPICS))
    return Exchange(prompt, IGNORANCE + ABILITIES, f"unknown {prompt}")


def draw_story_exchange(rng: Random) -> Exchange:
    story = draw_story(rng)
    return Exchange(story.prompt, story.text, story.case)


SKILLS = (
    Skill("addition", 0.25, draw_addition, has_same_answer),
    Skill("subtraction", 0.27, draw_subtraction, has_same_answer),
    Skill("count", 0.07, draw_count, has_same_answer),
    Skill("repeat", 0.12, draw_repeat, has_same_answer),
    Skill("capital", 0.06, draw_capital, has_same_answer),
    Skill("json", 0.07, draw_json, has_same_answer),
    Skill("greeting", 0.03, draw_greeting, has_same_answer),
    Skill("identity", 0.03, draw_identity, has_same_answer),
    Skill("korean", 0.03, draw_korean, has_same_answer),
    Skill("unknown", 0.04, draw_unknown, has_same_answer),
    Skill("story", 0.03, draw_story_exchange, is_telling),
)


def _draw_number(rng: Random) -> int:
    """One digit a quarter of the time: drawn evenly, it would be a tenth."""
    return rng.randrange(10) if rng.random() < 0.17 else rng.randrange(100)


def _draw_word(rng: Random) -> str:
    """Mostly words of the small world; some made-up ones, so that copying is learnt by letters."""
    if rng.random() < 0.15:
        return "".join(rng.choice(words.SYLLABLES) for _ in range(rng.randint(2, 3)))
    pool = rng.choice((words.OTHER_WORDS, words.OTHER_WORDS, words.NAMES, words.ANIMALS,
                       words.COLORS, words.THINGS, words.FOODS))  # fmt: skip
    return rng.choice(pool)
