"""What quire-demo can do without tools: how often each skill is drawn, and how it is marked.

An answer is a function of its prompt wherever that is possible, so that greedy decoding can be
marked by comparing texts. A skill is one function and one row of SKILLS.
"""

from random import Random

from .arithmetic import draw_addition, draw_count, draw_subtraction
from .copying import draw_greeting, draw_json, draw_repeat
from .exchange import Exchange, Skill, has_same_answer
from .replies import draw_capital, draw_identity, draw_korean, draw_unknown
from .stories import draw_story, is_story_about
from .tools import draw_toolless


def is_telling(exchange: Exchange, text: str) -> bool:
    return is_story_about(exchange.prompt, text)


def draw_story_exchange(rng: Random) -> Exchange:
    story = draw_story(rng)
    return Exchange(story.prompt, story.text, story.case)


SKILLS = (
    Skill("addition", 0.27, draw_addition, has_same_answer),
    Skill("subtraction", 0.31, draw_subtraction, has_same_answer),
    Skill("count", 0.06, draw_count, has_same_answer),
    Skill("repeat", 0.11, draw_repeat, has_same_answer),
    Skill("capital", 0.05, draw_capital, has_same_answer),
    Skill("json", 0.05, draw_json, has_same_answer),
    Skill("greeting", 0.025, draw_greeting, has_same_answer),
    Skill("identity", 0.035, draw_identity, has_same_answer),
    Skill("korean", 0.03, draw_korean, has_same_answer),
    Skill("unknown", 0.02, draw_unknown, has_same_answer),
    Skill("no tool", 0.02, draw_toolless, has_same_answer),
    Skill("story", 0.02, draw_story_exchange, is_telling),
)
