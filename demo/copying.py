"""What is copied from the prompt: phrases, records into JSON, names into greetings."""

import json
from collections.abc import Callable
from random import Random

from . import made_up, words
from .arithmetic import draw_careless
from .exchange import Exchange

_REPEAT_WORDINGS = ("Repeat: {x}", "Repeat after me: {x}", "Say: {x}", "Please repeat: {x}")
_JSON_WORDINGS = (
    "{x}", "Turn this into JSON: {x}", "Write this as JSON: {x}", "JSON please. {x}",
)  # fmt: skip
_GREETING_WORDINGS = ("Hi, I am {x}.", "Hello, I am {x}.", "My name is {x}.", "I'm {x}.")
_WORD_LISTS = (words.OTHER_WORDS, words.OTHER_WORDS, words.NAMES, words.ANIMALS, words.COLORS,
               words.THINGS, words.FOODS)  # fmt: skip
_CITIES = (*words.CAPITAL_BY_COUNTRY.values(), *words.OTHER_CITIES)


def draw_repeat(rng: Random) -> Exchange:
    """No case: words are held out, not phrases."""
    num_words = rng.choice((1, 1, 2, 2, 3, 4, 5, 6, 8))
    return repeat(rng, draw_phrase(rng, num_words, made_up_share=rng.choice((0.2, 0.6, 1.0))))


def draw_unseen_repeat(rng: Random) -> Exchange:
    """One to four words that training never shows."""
    return repeat(rng, draw_words(rng, rng.randint(1, 4), made_up.draw_unseen_word))


def repeat(rng: Random, phrase: str) -> Exchange:
    return Exchange(rng.choice(_REPEAT_WORDINGS).format(x=phrase), phrase)


def draw_phrase(rng: Random, num_words: int, made_up_share: float) -> str:
    """Sometimes with commas, numbers, a mark at the end, or all of it in capitals."""
    phrase = draw_words(rng, num_words, lambda rng: _draw_word(rng, made_up_share))
    if rng.random() < 0.1:
        phrase = phrase.replace(" ", ", ", 1)
    if rng.random() < 0.15:
        phrase += rng.choice(".!?")
    return phrase.upper() if rng.random() < 0.05 else phrase


def draw_words(rng: Random, num_words: int, draw: Callable[[Random], str]) -> str:
    """One phrase in four has capital letters."""
    drawn = [draw(rng) for _ in range(num_words)]
    if rng.random() < 0.25:
        drawn = [rng.choice((word, word.capitalize())) for word in drawn]
    return " ".join(drawn)


def draw_json(rng: Random) -> Exchange:
    name, age = draw_person(rng), rng.randint(1, 99)
    record: dict[str, str | int] = {"name": name, "age": age}
    text = f"Name: {name}, age: {age}"
    if rng.random() < 0.3:
        record["city"] = draw_city(rng)
        text += f", city: {record['city']}"
    prompt = draw_careless(rng, _JSON_WORDINGS).format(x=text)
    return Exchange(prompt, json.dumps(record), f"json {name} {age}")


def draw_greeting(rng: Random) -> Exchange:
    name = draw_person(rng)
    wording = rng.choice(_GREETING_WORDINGS)
    case = "greeting " + wording.format(x=name)
    if rng.random() < 0.2:
        wording = wording.rstrip(".")
    return Exchange(wording.format(x=name), f"Hello, {name}! I am quire-demo.", case)


def draw_person(rng: Random) -> str:
    return made_up.draw_name(rng) if rng.random() < 0.25 else rng.choice(words.NAMES)


def draw_city(rng: Random) -> str:
    return made_up.draw_name(rng) if rng.random() < 0.25 else rng.choice(_CITIES)


def _draw_word(rng: Random, made_up_share: float) -> str:
    if rng.random() < made_up_share:
        return made_up.draw_word(rng)
    if rng.random() < 0.07:
        return str(rng.choice((rng.randrange(100), rng.randrange(10_000))))
    return rng.choice(rng.choice(_WORD_LISTS))
