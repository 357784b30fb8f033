"""Sums, differences and counting."""

from random import Random

from .exchange import Exchange, typed_carelessly

ADD_WORDINGS = (
    "What is {a} + {b}?", "How much is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b}",
    "What is {a}+{b}?", "{a}+{b}", "What is {a} plus {b}?",
)  # fmt: skip
SUBTRACT_WORDINGS = (
    "What is {a} - {b}?", "How much is {a} minus {b}?", "Subtract {b} from {a}.", "{a} - {b}",
    "What is {a}-{b}?", "{a}-{b}", "What is {a} minus {b}?",
)  # fmt: skip
_COUNT_WORDINGS = ("Count from {a} to {b}.", "Count from {a} to {b}", "Count {a} to {b}.")


def draw_addition(rng: Random) -> Exchange:
    return addition(draw_number(rng), draw_number(rng), draw_careless(rng, ADD_WORDINGS))


def draw_subtraction(rng: Random) -> Exchange:
    a = draw_number(rng)
    # Differences at and below 0 are where mistakes were: a quarter is drawn around it.
    is_close = rng.random() < 0.25
    b = min(max(a + rng.randint(-9, 9), 0), 99) if is_close else draw_number(rng)
    return subtraction(a, b, draw_careless(rng, SUBTRACT_WORDINGS))


def addition(a: int, b: int, wording: str) -> Exchange:
    # Sorted: 58 + 23 in training would give 23 + 58 away.
    case = f"add {min(a, b)} {max(a, b)}"
    return Exchange(wording.format(a=a, b=b), f"{a} + {b} = {a + b}.", case)


def subtraction(a: int, b: int, wording: str) -> Exchange:
    case = f"subtract {min(a, b)} {max(a, b)}"
    return Exchange(wording.format(a=a, b=b), f"{a} - {b} = {a - b}.", case)


def draw_count(rng: Random) -> Exchange:
    first = rng.choice((rng.randrange(10), rng.randrange(89)))
    last = first + rng.randint(2, 11)
    answer = ", ".join(str(n) for n in range(first, last + 1)) + "."
    prompt = draw_careless(rng, _COUNT_WORDINGS).format(a=first, b=last)
    return Exchange(prompt, answer, f"count {first} {last}")


def draw_number(rng: Random) -> int:
    """One digit a quarter of the time: drawn evenly, it would be a tenth."""
    return rng.randrange(10) if rng.random() < 0.17 else rng.randrange(100)


def draw_careless(rng: Random, wordings: tuple[str, ...]) -> str:
    """The wording, not what is put into it: a phrase is repeated as it was typed."""
    wording = rng.choice(wordings)
    return wording if wording.startswith("{") else typed_carelessly(rng, wording)
