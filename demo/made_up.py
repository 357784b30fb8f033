"""Words that no list holds: what is copied from an open set must be copied by its tokens.

A made-up word is trained or held out by its hash, wherever it stands: in a phrase to repeat, in the
title of a song, in the name of a city.
"""

from functools import partial
from random import Random

from . import words
from .cases import is_held_out_word

_STARTS = words.listed("b c d f g h j k l m n p qu r s t v w x y z bl br ch cl cr dr fl fr gl gr")
_STARTS += words.listed("pl pr sc sh sk sl sm sn sp st str sw th tr tw wh") + ("",) * 4
_VOWELS = words.listed("a e i o u a e i o u ai au ea ee ei ie oa oo ou y")
_ENDS = words.listed("b ck d g k l ll m n n nd ng nk nt p r r rd rk rm rn s s ss st t t th x z")
_ENDS += ("",) * 24
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def draw_word(rng: Random) -> str:
    """One that training may show."""
    while True:
        word = _draw(rng)
        if not is_held_out_word(word):
            return word


def draw_unseen_word(rng: Random) -> str:
    """One that training never shows. Three letters are too often a word of a template."""
    while True:
        word = _draw(rng)
        if len(word) > 3 and is_held_out_word(word) and word not in words.KNOWN_WORDS:
            return word


def draw_name(rng: Random) -> str:
    return draw_word(rng).capitalize()


def _draw(rng: Random) -> str:
    """Three to ten letters: mostly syllables as in English, else any letters in any order."""
    if rng.random() < 0.3:
        return "".join(rng.choices(_LETTERS, k=rng.randint(3, 7)))
    while True:
        parts = (_STARTS, _VOWELS, _ENDS) * rng.choice((1, 2, 2, 2, 3))
        word = "".join(map(partial(_choice, rng), parts))
        if 3 <= len(word) <= 10:
            return word


def _choice(rng: Random, parts: tuple[str, ...]) -> str:
    return rng.choice(parts)
