"""Types of the fields of bodies: what pydantic checks of them, and what /openapi.json tells.

Ranges are only told here; they are the engine's to check, once for all dialects.
"""

from typing import Annotated, Any

from pydantic import FailFast, Field, WithJsonSchema

from ....engine.sampling_params import (
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_N,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
)

JsonObject = dict[str, Any]

_I32, _U32 = 2**31, 2**32


class FirstError(FailFast):
    """One error is enough: a list of millions would give millions."""

    def __hash__(self) -> int:
        """FailFast has none, so a union could not hold it."""
        return 0


def _told(**schema: Any) -> Any:
    return Field(json_schema_extra=schema)


_TOKEN_ID: JsonObject = {"type": "integer", "minimum": 0, "maximum": _U32 - 1}
_SOME_TEXT: JsonObject = {"type": "string", "minLength": 1}

Objects = Annotated[list[JsonObject], FirstError()]
SomeIds = Annotated[list[int], FirstError(), _told(items=_TOKEN_ID, minItems=1)]
StopIds = Annotated[list[int], FirstError(), _told(items=_TOKEN_ID, maxItems=MAX_STOP_TOKEN_IDS)]
SomeText = Annotated[str, _told(minLength=1)]
Stops = Annotated[list[str], FirstError(), _told(items=_SOME_TEXT, maxItems=MAX_STOPS)]
BadWords = Annotated[list[str], FirstError(), _told(items=_SOME_TEXT, maxItems=MAX_BAD_WORDS)]
Biases = Annotated[
    dict[str, float],
    Field(
        max_length=1024,
        json_schema_extra={
            "maxProperties": MAX_LOGIT_BIAS,
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
    ),
]

Count = Annotated[int, _told(minimum=0, maximum=_U32 - 1)]
AtLeastOne = Annotated[int, _told(minimum=1, maximum=_U32 - 1)]
NumAnswers = Annotated[int, _told(minimum=1, maximum=MAX_N)]
TopK = Annotated[int, _told(minimum=-1, maximum=_U32 - 1)]
MinusOneOrMore = Annotated[int, _told(minimum=-1, maximum=_I32 - 1)]
NumKept = Annotated[int, _told(anyOf=[{"const": -1}, {"minimum": 1}], minimum=-1, maximum=_I32 - 1)]
Priority = Annotated[int, _told(minimum=-_I32, maximum=_I32 - 1)]
Temperature = Annotated[float, _told(minimum=0, maximum=2)]
Share = Annotated[float, _told(minimum=0, maximum=1)]
PositiveShare = Annotated[float, _told(exclusiveMinimum=0, maximum=1)]
Positive = Annotated[float, _told(exclusiveMinimum=0)]
Penalty = Annotated[float, _told(minimum=-2, maximum=2)]

# Parts are joined in requests.py, which says which one is none of text.
Parts = Annotated[
    list[JsonObject],
    FirstError(),
    WithJsonSchema(
        {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "text"],
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
            },
        }
    ),
]

# Read in prompts_of(): pydantic would make an error of each item of a list of millions.
Prompt = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                {"type": "array", "items": _TOKEN_ID, "minItems": 1},
                {
                    "type": "array",
                    "items": {"type": "array", "items": _TOKEN_ID, "minItems": 1},
                    "minItems": 1,
                },
            ]
        }
    ),
]
