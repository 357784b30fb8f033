"""Short stories from templates: a plot is a list of sentences with slots, some with a variant."""

from dataclasses import dataclass
from random import Random

from . import words

_OPENINGS = (
    "Once upon a time, {article} {animal} named {name} lived in a {place}.",
    "Long ago, {article} {animal} named {name} lived near a {place}.",
)

_PLOTS = (
    (
        ("Every day {name} carried a {color} {thing} and sang a little song.",),
        ("One morning the {thing} was gone.", "One evening the {thing} was lost."),
        ("{name} looked under the bed, behind the door and in the grass, but found nothing.",),
        ("Then {name} met {friend_article} {friend}, who was eating {food}.",),
        ('"Have you seen my {thing}?" asked {name}.',),
        ('"Yes," said the {friend}, "it fell into the river, and I can swim."',),
        ("The {friend} jumped into the cold water and came back with the {color} {thing}.",),
        ("{name} was so happy that they shared the {food} and danced until the moon came up.",),
        ("From that day on, {name} and the {friend} were best friends.",),
    ),
    (
        ("{name} was small, but {name} was not afraid of anything.",),
        ("One night a big storm came over the {place}.", "One winter a lot of snow fell there."),
        ("The wind was loud, and {friend_article} {friend} knocked at the door.",),
        ('"Please let me in," said the {friend}, "I am cold and I have lost my way."',),
        ("{name} opened the door, made a warm fire and cooked some {food}.",),
        ("They told each other old stories until the morning.",),
        ("When the sun came out, the {friend} gave {name} a {color} {thing}.",),
        ('"Whenever you need me, use the {thing}," said the {friend}, "and I will come."',),
        ("{name} kept it for a long time, and was never alone again.",),
    ),
    (
        ("{name} wanted to know what was on the other side of the hill.",),
        ("So {name} packed some {food} and a {color} {thing} and began to walk.",),
        ("On the first day it rained.", "On the first day the sun was hot."),
        ("On the second day {name} met {friend_article} {friend} who was sad.",),
        ('"Why are you sad?" asked {name}.',),
        ('"I have no friends and nothing to eat," said the {friend}.',),
        ("{name} gave the {friend} half of the {food}, and they walked on together.",),
        ("On the third day they stood on the hill and saw the sea, wide and bright.",),
        ("They stayed there for a long time, and then they went home as friends.",),
    ),
)

ENDING = "The end."


@dataclass(frozen=True)
class Story:
    prompt: str
    text: str
    case: str | None  # None where the prompt leaves the hero open


def draw_story(rng: Random) -> Story:
    animal, name = rng.choice(words.ANIMALS), rng.choice(words.NAMES)
    friend = rng.choice([a for a in words.ANIMALS if a != animal])
    slots = {
        "animal": animal,
        "article": article_of(animal),
        "name": name,
        "friend": friend,
        "friend_article": article_of(friend),
        "place": rng.choice(words.PLACES),
        "thing": rng.choice(words.THINGS),
        "color": rng.choice(words.COLORS),
        "food": rng.choice(words.FOODS),
    }
    sentences = [rng.choice(_OPENINGS)]
    sentences += [rng.choice(variants) for variants in rng.choice(_PLOTS)]
    text = " ".join([*sentences, ENDING]).format(**slots)
    start = rng.choice(("Tell me a story", "Tell me a short story"))
    kind = rng.randrange(3)
    if kind == 0:
        return Story(f"{start}.", text, None)
    about = f"{start} about {article_of(animal)} {animal}"
    if kind == 1:
        return Story(f"{about}.", text, None)
    return Story(f"{about} named {name}.", text, f"story {animal} {name}")


def is_story_about(prompt: str, text: str) -> bool:
    """Whether it opens and ends like a story and its hero is the one the prompt asked for."""
    _, _, wanted = prompt.rstrip(".").partition(" about ")
    opening = text.split(".")[0]
    return opening.startswith(("Once", "Long")) and wanted in opening and text.endswith(ENDING)


def article_of(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"
