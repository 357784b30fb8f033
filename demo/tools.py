"""Tools: how they are described, how a user asks for them, what they say, and what is made of it.

A tool of the same kind has other names, parameter names and descriptions from one conversation to
the next, and some tools are made up, so that a call is read off the description. A new kind is one
row of KINDS.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from . import made_up, words
from .arithmetic import draw_careless
from .copying import draw_city, draw_person, draw_phrase
from .exchange import Exchange, ToolCall

Arguments = dict[str, str | int]
_ERRORS = ("not found", "no network", "timed out", "not allowed")


@dataclass(frozen=True)
class Parameter:
    """names: of which one is drawn for a conversation; the first is the one in wordings."""

    names: tuple[str, ...]
    description: str
    draw: Callable[[Random], str | int]
    type: str = "string"


@dataclass(frozen=True)
class ToolKind:
    """answer is a text with slots for the arguments and what the tool says."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    wordings: tuple[str, ...]
    draw_result: Callable[[Random], dict[str, str | int]]
    answer: str
    refusal: str  # when there is no such tool


@dataclass(frozen=True)
class Tool:
    """A kind as one conversation has it: one of its names, one of each parameter's."""

    kind: ToolKind
    name: str
    description: str
    parameter_names: tuple[str, ...]
    has_descriptions: bool  # of its parameters

    def definition(self) -> dict[str, Any]:
        """In OpenAI's form."""
        properties: dict[str, dict[str, str]] = {}
        for name, parameter in zip(self.parameter_names, self.kind.parameters, strict=True):
            properties[name] = {"type": parameter.type}
            if self.has_descriptions:
                properties[name]["description"] = parameter.description
        schema = {
            "type": "object",
            "properties": properties,
            "required": list(self.parameter_names),
        }
        function = {"name": self.name, "description": self.description, "parameters": schema}
        return {"type": "function", "function": function}


def draw_tools(rng: Random, num_tools: int) -> list[Tool]:
    """Tools of different kinds, in any order; one in eight is made up."""
    kinds = rng.sample(KINDS, num_tools)
    return [draw_tool(rng, draw_kind(rng) if rng.random() < 0.12 else kind) for kind in kinds]


def draw_tool(rng: Random, kind: ToolKind) -> Tool:
    """Half the time with the first of its names, and so its parameters."""
    names = tuple(_draw_name(rng, parameter.names) for parameter in kind.parameters)
    description = rng.choice(kind.descriptions)
    return Tool(kind, _draw_name(rng, kind.names), description, names, rng.random() < 0.3)


def draw_kind(rng: Random) -> ToolKind:
    """A tool that nobody has seen: asked for by its name, with its parameters by theirs."""
    verb, noun = _draw_term(rng), _draw_term(rng)
    name = rng.choice((f"{verb}_{noun}", verb, f"{verb}_{noun}"))
    parameters = []
    for term in {_draw_term(rng): None for _ in range(rng.randint(1, 2))}:
        if rng.random() < 0.5:
            parameters.append(Parameter((term,), f"The {term}", _draw_int, "integer"))
        else:
            parameters.append(Parameter((term,), f"The {term}", _draw_term))
    given = " and ".join(f"{p.names[0]} {{{p.names[0]}}}" for p in parameters)
    return ToolKind(
        names=(name,),
        descriptions=(f"{verb.capitalize()} the {noun}", f"Do {verb} with {noun}"),
        parameters=tuple(parameters),
        wordings=(
            f"Call {name} with {given}.",
            f"Use {name} with {given}.",
            f"{name} with {given}",
        ),
        draw_result=lambda rng: {"result": rng.choice((_draw_int, _draw_term))(rng)},
        answer="The result is {result}.",
        refusal="I have no tool of that name.",
    )


def draw_use(rng: Random, tool: Tool) -> Exchange:
    """The request, the call, what the tool says (sometimes an error) and the answer."""
    kind = tool.kind
    values = {p.names[0]: p.draw(rng) for p in kind.parameters}
    prompt = draw_careless(rng, kind.wordings).format(**values)
    result = kind.draw_result(rng)
    answer = kind.answer.format(**values, **result)
    if rng.random() < 0.08:
        error = rng.choice(_ERRORS)
        result, answer = {"error": error}, f"That did not work: {error}."
    arguments: Arguments = dict(zip(tool.parameter_names, values.values(), strict=True))
    call = ToolCall(tool.name, arguments, json.dumps(result))
    return Exchange(prompt, answer, f"{kind.names[0]} {json.dumps(values)}", call)


def draw_refused(rng: Random, offered: list[Tool]) -> Exchange:
    """A request for a tool that is not there."""
    kinds = [kind for kind in KINDS if all(tool.kind is not kind for tool in offered)]
    kind = draw_kind(rng) if rng.random() < 0.05 else rng.choice(kinds)
    values = {p.names[0]: p.draw(rng) for p in kind.parameters}
    prompt = draw_careless(rng, kind.wordings).format(**values)
    return Exchange(prompt, kind.refusal, f"{kind.names[0]} {json.dumps(values)}")


def draw_toolless(rng: Random) -> Exchange:
    return draw_refused(rng, [])


def _draw_name(rng: Random, names: tuple[str, ...]) -> str:
    return names[0] if rng.random() < 0.5 else rng.choice(names)


def _draw_term(rng: Random) -> str:
    return made_up.draw_word(rng) if rng.random() < 0.6 else rng.choice(words.OTHER_WORDS)


def _draw_int(rng: Random) -> int:
    return rng.choice((rng.randrange(100), rng.randrange(10_000)))


def _draw_text(rng: Random) -> str:
    return draw_phrase(rng, rng.randint(1, 5), made_up_share=0.2).rstrip(".?!")


def _draw_title(rng: Random) -> str:
    return draw_phrase(rng, rng.randint(1, 3), made_up_share=0.2).rstrip(".?!").title()


_CITY = Parameter(("city", "location", "place"), "Name of the city", draw_city)

KINDS = (
    ToolKind(
        ("get_weather", "weather", "get_current_weather"),
        ("Weather in a city", "Get the weather", "Get the current weather of a city"),
        (_CITY,),
        ("What is the weather in {city}?", "What's the weather in {city}?",
         "How is the weather in {city}?", "What is the weather like in {city}?",
         "Tell me the weather in {city}.", "weather in {city}"),
        lambda rng: {"temperature": rng.randint(-15, 40),
                     "condition": rng.choice(words.CONDITIONS)},
        "It is {temperature} degrees and {condition} in {city}.",
        "I have no tool for the weather.",
    ),
    ToolKind(
        ("get_time", "time", "get_current_time"),
        ("Time in a city", "Get the time", "Get the local time of a city"),
        (_CITY,),
        ("What time is it in {city}?", "What is the time in {city}?",
         "Tell me the time in {city}.", "time in {city}"),
        lambda rng: {"time": f"{rng.randrange(24):02}:{rng.randrange(60):02}"},
        "It is {time} in {city}.",
        "I have no tool for the time.",
    ),
    ToolKind(
        ("set_timer", "timer", "start_timer"),
        ("Set a timer", "Start a timer of some minutes"),
        (Parameter(("minutes", "duration"), "How many minutes", lambda rng: rng.randint(2, 120),
                   "integer"),),
        ("Set a timer for {minutes} minutes.", "Start a timer for {minutes} minutes.",
         "Set a timer of {minutes} minutes.", "timer {minutes} minutes"),
        lambda rng: {"status": "ok"},
        "The timer is set for {minutes} minutes.",
        "I have no tool for timers.",
    ),
    ToolKind(
        ("send_message", "message", "send_text"),
        ("Send a message", "Send a text message to a person"),
        (Parameter(("to", "recipient"), "Who gets it", draw_person),
         Parameter(("text", "message"), "What it says", _draw_text)),
        ("Send a message to {to}: {text}", "Send {to} a message: {text}", "Tell {to}: {text}",
         "Message {to}: {text}"),
        lambda rng: {"status": "sent"},
        "I sent your message to {to}.",
        "I have no tool for messages.",
    ),
    ToolKind(
        ("play_song", "play", "play_music"),
        ("Play a song", "Play a song by its title"),
        (Parameter(("title", "song"), "Title of the song", _draw_title),),
        ("Play {title}.", "Play the song {title}.", "Please play {title}.",
         "I want to hear {title}."),
        lambda rng: {"status": "playing"},
        "Now playing: {title}.",
        "I have no tool for music.",
    ),
    ToolKind(
        ("search", "web_search", "search_web"),
        ("Search the web", "Look something up on the web"),
        (Parameter(("query", "q"), "What to look for", _draw_text),),
        ("Search for {query}.", "Search the web for {query}.", "Look up {query}."),
        lambda rng: {"result": _draw_text(rng)},
        "I found this: {result}.",
        "I have no tool for searching.",
    ),
    ToolKind(
        ("roll_dice", "roll", "roll_die"),
        ("Roll a die", "Roll a die with some sides"),
        (Parameter(("sides", "num_sides"), "How many sides", lambda rng: rng.randint(2, 100),
                   "integer"),),
        ("Roll a die with {sides} sides.", "Roll a {sides}-sided die.",
         "Throw a die with {sides} sides."),
        lambda rng: {"value": rng.randint(1, 99)},
        "You rolled {value}.",
        "I have no tool for dice.",
    ),
)  # fmt: skip
