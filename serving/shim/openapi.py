"""/openapi.json: what each route takes and answers, made from the models that read the bodies."""

from typing import Any

from pydantic.json_schema import models_json_schema

from ... import __version__
from .http import REQUEST_ID
from .openai.examples import QUESTION
from .openai.fields import ACCEPTED, NOTHING
from .openai.requests import ChatBody, CompletionBody
from .openapi_answers import ANSWERS, TEXT, Schema, closed, events

_JSON = "application/json"
_REF = "#/components/schemas/{model}"

# status -> when
_STATUSES = {
    400: "the request is not understood, or a field is not honoured",
    401: "no key, or a wrong one",
    404: "the model is not served",
    405: "the route takes another method",
    408: "the request did not come in time",
    409: "the request id is that of an open request",
    413: "the body is too large",
    415: "the body is not JSON, or is compressed",
    429: "the queue is full; Retry-After says when to try again",
    431: "the head of the request is too large",
    500: "the server failed at this request",
    503: "the engine is starting, restarting or stopping; Retry-After says when to try again",
    504: "the request was not done in its time",
}
_OF_ALL = (400, 405, 408, 431, 500)
_OF_ENGINE = (401, 503)
_OF_BODIES = (404, 413, 415)
_OF_GENERATION = (409, 429, 504)
_WITHOUT_BODY = (408, 431)  # what ends a connection may have none
_HEADERS = {401: ("WWW-Authenticate",), 405: ("Allow",), 429: ("Retry-After",)}
_HEADERS[503] = _HEADERS[429]


def document(*, refuses_unknown: bool) -> dict[str, Any]:
    """The whole document, OpenAPI 3.1. refuses_unknown: fields that do not stand here."""
    _, made = models_json_schema(
        [(ChatBody, "validation"), (CompletionBody, "validation")], ref_template=_REF
    )
    schemas = ANSWERS | made["$defs"]
    for name in ("ChatBody", "CompletionBody"):
        schemas[name] = _with_accepted(schemas[name], refuses_unknown)
    return {
        "openapi": "3.1.0",
        "info": {"title": "quire", "version": __version__},
        "paths": _paths(),
        "components": {
            "schemas": schemas,
            "parameters": {"X-Request-Id": _REQUEST_ID},
            "headers": _RESPONSE_HEADERS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


def _paths() -> dict[str, Any]:
    health = _operation("Whether the engine serves: 200, or 503", _ref("Healthy"), (503,))
    health["security"] = []
    health["responses"]["503"]["content"] = {_JSON: {"schema": _ref("Unhealthy")}}
    metrics = _operation("Prometheus metrics", TEXT, _OF_ENGINE, kind="text/plain")
    one_model = _operation("One served model", _ref("Model"), (*_OF_ENGINE, 404))
    one_model["parameters"].append(_NAME)
    return {
        "/v1/chat/completions": {"post": _generation("Answer a conversation", "Chat")},
        "/v1/completions": {"post": _generation("Continue a prompt", "Completion")},
        "/v1/models": {"get": _operation("The served models", _ref("Models"), _OF_ENGINE)},
        "/v1/models/{name}": {"get": one_model},
        "/tokenize": {"post": _post("Text or messages to token ids", _TOKENIZE, "Tokens")},
        "/detokenize": {"post": _post("Token ids to text", _DETOKENIZE, "Text")},
        "/version": {
            "get": _operation("The version of the server", _ref("Version"), _OF_ENGINE),
        },
        "/metrics": {"get": metrics},
        **{path: {"get": health} for path in ("/health", "/ready", "/ping")},
    }


def _ref(model: str, what: str = "schemas") -> Schema:
    return {"$ref": f"#/components/{what}/{model}"}


def _generation(summary: str, name: str) -> dict[str, Any]:
    made = _post(summary, _ref(f"{name}Body"), f"{name}Answer", *_OF_GENERATION)
    event = events(_ref(f"{name}Chunk"), _ref("Error"))
    made["responses"]["200"]["content"]["text/event-stream"] = {"schema": event}
    return made


def _post(summary: str, body: Schema, answer: str, *statuses: int) -> dict[str, Any]:
    made = _operation(summary, _ref(answer), (*_OF_ENGINE, *_OF_BODIES, *statuses))
    made["requestBody"] = {"required": True, "content": {_JSON: {"schema": body}}}
    return made


def _operation(
    summary: str, answer: Schema, statuses: tuple[int, ...], *, kind: str = _JSON
) -> dict[str, Any]:
    responses = {"200": _response("the answer", {kind: {"schema": answer}})}
    for status in sorted({*_OF_ALL, *statuses}):
        responses[str(status)] = _response(
            _STATUSES[status],
            {} if status in _WITHOUT_BODY else {_JSON: {"schema": _ref("Error")}},
            *_HEADERS.get(status, ()),
        )
    parameters = [_ref("X-Request-Id", "parameters")]
    return {"summary": summary, "parameters": parameters, "responses": responses}


def _response(description: str, content: dict[str, Any], *headers: str) -> dict[str, Any]:
    made: dict[str, Any] = {"description": description}
    if content:
        made["content"] = content
        headers = ("X-Request-Id", *headers)
    if headers:
        made["headers"] = {name: _ref(name, "headers") for name in headers}
    return made


def _with_accepted(body: Schema, refuses_unknown: bool) -> Schema:
    accepted: Schema = {}
    for name, values in ACCEPTED.items():
        accepted[name] = {} if values is None else {"enum": [*values, *NOTHING]}
        accepted[name]["description"] = "without effect"
    return body | {
        "properties": body["properties"] | accepted,
        "additionalProperties": not refuses_unknown,
    }


_ID_SCHEMA = {"type": "string", "pattern": f"^{REQUEST_ID}$"}
_REQUEST_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "comes back, and is part of the answer's id; made if not given",
    "schema": _ID_SCHEMA,
}
_RESPONSE_HEADERS: dict[str, Schema] = {
    "X-Request-Id": {
        "description": "that of the request, or one that was made for it",
        "required": True,
        "schema": _ID_SCHEMA,
    },
    "WWW-Authenticate": {"required": True, "schema": {"const": "Bearer"}},
    "Allow": {"required": True, "schema": TEXT},
    "Retry-After": {
        "description": "seconds; retry-after-ms has them in milliseconds",
        "schema": {"type": "integer", "minimum": 1},
    },
}
_NAME = {"name": "name", "in": "path", "required": True, "schema": TEXT}

_TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
_FLAG: Schema = {"type": ["boolean", "null"]}
_MODEL = _TEXT_OR_NULL | {"description": "a served name; any if not given"}
_TOKENIZE: Schema = {
    **closed(
        {},
        {
            "model": _MODEL,
            "prompt": _TEXT_OR_NULL | {"description": "a text; or send messages"},
            "messages": {
                "type": ["array", "null"],
                "items": _ref("Message"),
                "description": "a conversation, which the chat template makes a text of",
            },
            "add_special_tokens": _FLAG
            | {"description": "of the tokenizer; by default true for a text, false for messages"},
            "add_generation_prompt": _FLAG | {"description": "of messages; true by default"},
            "return_token_strs": _FLAG | {"description": "the text of each token too"},
        },
    ),
    "oneOf": [
        {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
        {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
    ],
    "examples": [{"prompt": "Hello there", "return_token_strs": True}, {"messages": QUESTION}],
}
_DETOKENIZE: Schema = {
    **closed(
        {
            "tokens": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
                "description": "token ids",
            }
        },
        {"model": _MODEL},
    ),
    "examples": [{"tokens": [5, 6, 7]}],
}
