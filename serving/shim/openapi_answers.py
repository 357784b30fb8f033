"""JSON schemas of what the routes answer with 200, for /openapi.json.

Closed: a field that an answer has is a field that stands here. `make clients` compares.
"""

from typing import Any

from .openai.answers import CHAT, COMPLETION, LEAST_LOGPROB, Shape

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_TOKEN_IDS: Schema = {"type": "array", "items": _COUNT}
_NULL: Schema = {"type": "null"}
_LOGPROB: Schema = {"type": "number", "minimum": LEAST_LOGPROB}


def closed(required: Schema, optional: Schema | None = None) -> Schema:
    """An object of these fields and no others."""
    return {
        "type": "object",
        "required": list(required),
        "properties": required | (optional or {}),
        "additionalProperties": False,
    }


def _list_of(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, _NULL]}


def _one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


_USAGE = closed(
    {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": closed({"cached_tokens": _COUNT}),
    }
)
_PROMPT_LOGPROBS = _list_of(
    _or_null(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]+$"},
            "minProperties": 1,
            "additionalProperties": closed(
                {"logprob": _LOGPROB, "rank": {"type": "integer"}, "decoded_token": TEXT}
            ),
        }
    )
)

_BYTE: Schema = {"type": "integer", "minimum": 0, "maximum": 255}
_CHAT_TOKEN: Schema = {"token": TEXT, "logprob": _LOGPROB, "bytes": _or_null(_list_of(_BYTE))}
_CHAT_LOGPROBS = closed(
    {
        "content": _list_of(closed(_CHAT_TOKEN | {"top_logprobs": _list_of(closed(_CHAT_TOKEN))})),
        "refusal": _NULL,
    }
)
_COMPLETION_LOGPROBS = closed(
    {
        "tokens": _list_of(TEXT),
        "token_logprobs": _list_of(_or_null(_LOGPROB)),
        "top_logprobs": _list_of(
            _or_null({"type": "object", "additionalProperties": _LOGPROB, "minProperties": 1})
        ),
        "text_offset": _TOKEN_IDS,
    }
)
_ENDING: Schema = {
    "finish_reason": _one_of("stop", "length", "abort"),
    "stop_reason": {"type": ["string", "integer", "null"], "description": "what of stop matched"},
}


def _head(shape: Shape, kind: str) -> Schema:
    return {
        "id": {"type": "string", "pattern": f"^{shape.prefix}-"},
        "object": {"const": kind},
        "created": {"type": "integer", "description": "seconds since 1970"},
        "model": TEXT,
        "system_fingerprint": _NULL,
    }


def _answer(shape: Shape, choice: Schema, optional: Schema) -> Schema:
    head = _head(shape, shape.kind)
    return closed(head | {"choices": _list_of(choice, minItems=1), "usage": _USAGE}, optional)


def _chunk(shape: Shape, said: Schema, logprobs: Schema) -> Schema:
    """Of a stream: a part of one choice, or the usage of all after them."""
    choice = closed(
        {
            "index": _COUNT,
            **said,
            "logprobs": _or_null(logprobs),
            "finish_reason": _or_null(_ENDING["finish_reason"]),
        },
        {"stop_reason": _ENDING["stop_reason"], "token_ids": _TOKEN_IDS},
    )
    head = _head(shape, shape.chunk_kind)
    usage = _or_null(_USAGE | {"required": _USAGE["required"][:3]})
    return closed(head | {"choices": _list_of(choice, maxItems=1)}, {"usage": usage})


def events(chunk: Schema, error: Schema) -> Schema:
    """One event of a stream. OpenAPI 3.1 has no word for this; clients that generate from it take
    the schema of an event stream for that of an event.
    """
    payload = {"contentMediaType": "application/json", "contentSchema": {"anyOf": [chunk, error]}}
    return {
        "type": "object",
        "description": "with stream: true",
        "required": ["data"],
        "properties": {"data": TEXT | {"anyOf": [{"const": "[DONE]"}, payload]}},
    }


_MODEL = closed(
    {
        "id": TEXT,
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": TEXT,
        "root": TEXT,
        "parent": _NULL,
        "max_model_len": {"type": "integer", "minimum": 1},
    }
)

ANSWERS: dict[str, Schema] = {
    "ChatAnswer": _answer(
        CHAT,
        closed(
            {
                "index": _COUNT,
                "message": closed({"role": TEXT, "content": TEXT, "refusal": _NULL}),
                "logprobs": _or_null(_CHAT_LOGPROBS),
                **_ENDING,
            },
            {"token_ids": _TOKEN_IDS},
        ),
        {"prompt_logprobs": _PROMPT_LOGPROBS},
    ),
    "CompletionAnswer": _answer(
        COMPLETION,
        closed(
            {"index": _COUNT, "text": TEXT, "logprobs": _or_null(_COMPLETION_LOGPROBS), **_ENDING},
            {"token_ids": _TOKEN_IDS, "prompt_logprobs": _PROMPT_LOGPROBS},
        ),
        {},
    ),
    "ChatChunk": _chunk(
        CHAT, {"delta": closed({}, {"role": TEXT, "content": TEXT})}, _CHAT_LOGPROBS
    ),
    "CompletionChunk": _chunk(COMPLETION, {"text": TEXT}, _COMPLETION_LOGPROBS),
    "Model": _MODEL,
    "Models": closed({"object": {"const": "list"}, "data": _list_of(_MODEL, minItems=1)}),
    "Tokens": closed(
        {
            "count": _COUNT,
            "max_model_len": {"type": "integer", "minimum": 1},
            "tokens": _TOKEN_IDS,
            "token_strs": _or_null(_list_of(TEXT)),
        }
    ),
    "Text": closed(
        {
            "prompt": TEXT | {"description": "the text, by vLLM's name"},
            "content": TEXT | {"description": "the same, by llama-server's"},
            "text": TEXT | {"description": "the same, by SGLang's"},
        }
    ),
    "Version": closed({"version": TEXT}),
    "Healthy": closed({"status": {"const": "ok"}}),
    "Unhealthy": closed({"status": TEXT}),
    "Error": closed(
        {
            "error": closed(
                {
                    "message": TEXT,
                    "type": TEXT,
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                }
            )
        }
    ),
}
