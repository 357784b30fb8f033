"""Fixed replies: who the model is, capitals, Korean, and what it says that it does not know."""

from dataclasses import replace
from random import Random

from . import words
from .arithmetic import draw_number
from .exchange import Exchange, typed_carelessly

INTRODUCTION = (
    "I am quire-demo, a tiny model shipped with quire to show that the engine works. "
    "I know only a small world."
)
ABILITIES = (
    "I can add and subtract small numbers, count, repeat a phrase, name some capitals, "
    "turn a name and an age into JSON, greet you, tell a short story, and call the tools you give "
    "me."
)
IGNORANCE = "I do not know that. I am a tiny model and know only a small world. "

REPLY_BY_PROMPT = {
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

CAPITAL_WORDINGS = (
    "What is the capital of {x}?", "Name the capital of {x}.", "Which city is the capital of {x}?",
    "Tell me the capital of {x}.", "capital of {x}?",
)  # fmt: skip
_UNKNOWN_WORDINGS = (
    "Tell me about {x}.", "What do you know about {x}?", "Explain {x}.", "Can you explain {x}?",
    "Write a poem about {x}.", "What is {x}?", "Why do people like {x}?", "Teach me {x}.",
)  # fmt: skip
_KOREAN_INTRODUCTION = "저는 quire-demo예요. 아주 작은 모델이에요."
KOREAN_REPLY_BY_PROMPT = {
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
KOREAN_GREETING_WORDINGS = ("안녕하세요, 저는 {}.", "저는 {}.")


def draw_capital(rng: Random) -> Exchange:
    wording, country = rng.choice(CAPITAL_WORDINGS), rng.choice(list(words.CAPITAL_BY_COUNTRY))
    exchange = capital(country, wording)
    return replace(exchange, prompt=_typed(rng, exchange.prompt))


def capital(country: str, wording: str) -> Exchange:
    """The case is a wording of a fact: the fact itself is always trained in other wordings."""
    prompt = wording.format(x=country)
    answer = f"The capital of {country} is {words.CAPITAL_BY_COUNTRY[country]}."
    return Exchange(prompt, answer, f"capital {prompt}")


def draw_identity(rng: Random) -> Exchange:
    prompt = rng.choice(list(REPLY_BY_PROMPT))
    return Exchange(_typed(rng, prompt), REPLY_BY_PROMPT[prompt])


def draw_korean(rng: Random) -> Exchange:
    if rng.random() < 0.5:
        prompt = rng.choice(list(KOREAN_REPLY_BY_PROMPT))
        return Exchange(prompt, KOREAN_REPLY_BY_PROMPT[prompt])
    name = rng.choice(words.KOREAN_NAMES)
    if rng.random() < 0.5:  # so that names are copied, not known
        name = "".join(rng.choice(rng.choice(words.KOREAN_NAMES)) for _ in range(2))
    return korean_greeting(name, rng.choice(KOREAN_GREETING_WORDINGS))


def korean_greeting(name: str, wording: str) -> Exchange:
    # The copula follows the last syllable's final consonant (Unicode 3.12: 28 finals a vowel).
    has_final = (ord(name[-1]) - 0xAC00) % 28 != 0
    prompt = wording.format(name + ("이에요" if has_final else "예요"))
    return Exchange(prompt, f"안녕하세요, {name} 님! 만나서 반가워요.", f"korean {prompt}")


def draw_unknown(rng: Random) -> Exchange:
    """Questions from outside the small world, and the honest answer."""
    kind = rng.random()
    if kind < 0.3:
        country = rng.choice(words.UNKNOWN_COUNTRIES)
        prompt = rng.choice(CAPITAL_WORDINGS).format(x=country)
        answer = f"I do not know the capital of {country}."
        return Exchange(_typed(rng, prompt), answer, f"unknown {prompt}")
    if kind < 0.45:
        operator = rng.choice(("times", "divided by", "*", "/"))
        prompt = f"What is {draw_number(rng)} {operator} {draw_number(rng)}?"
        return Exchange(prompt, "I can only add and subtract.", f"unknown {prompt}")
    prompt = rng.choice(_UNKNOWN_WORDINGS).format(x=rng.choice(words.UNKNOWN_TOPICS))
    return Exchange(_typed(rng, prompt), IGNORANCE + ABILITIES, f"unknown {prompt}")


def _typed(rng: Random, prompt: str) -> str:
    """As people type what is known as a whole: sometimes without any capital letter."""
    prompt = typed_carelessly(rng, prompt)
    return prompt.lower() if rng.random() < 0.15 else prompt
