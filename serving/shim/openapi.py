"""/openapi.json: what each route takes and answers, made from the models that read the bodies."""

from typing import Any

from pydantic.json_schema import models_json_schema

from ... import __version__
from .openai.requests import ChatBody, CompletionBody

_JSON = "application/json"
_REF = "#/components/schemas/{model}"

# status -> when
_ERRORS = {
    400: "the request is not understood, or a field is not honoured",
    401: "no key, or a wrong one",
    404: "the model is not served",
    405: "the route takes another method",
    408: "the body did not come in time",
    409: "the request id is that of an open request",
    413: "the body is too large",
    415: "the body is not JSON, or is compressed",
    429: "the queue is full; Retry-After says when to try again",
    431: "the head of the request is too large",
    500: "the server failed at this request",
    503: "the engine is starting, restarting or stopping; Retry-After says when to try again",
    504: "the request was not done in its time",
}
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_OBJECT = {"type": "object"}
_TEXTS = {
    "tokenize": {
        "type": "object",
        "properties": {
            "model": {"type": ["string", "null"]},
            "prompt": {"type": ["string", "null"]},
            "messages": {"type": ["array", "null"], "items": _OBJECT},
            "add_special_tokens": {"type": ["boolean", "null"]},
            "add_generation_prompt": {"type": ["boolean", "null"]},
            "return_token_strs": {"type": ["boolean", "null"]},
        },
    },
    "detokenize": {
        "type": "object",
        "required": ["tokens"],
        "properties": {
            "model": {"type": ["string", "null"]},
            "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        },
    },
}


def document() -> dict[str, Any]:
    """The whole document, OpenAPI 3.1."""
    _, made = models_json_schema(
        [(ChatBody, "validation"), (CompletionBody, "validation")], ref_template=_REF
    )
    schemas = {**made["$defs"], "Error": _ERROR_SCHEMA}
    streams = {"text/event-stream": {"schema": {"type": "string"}}}
    paths = {
        "/v1/chat/completions": {"post": _post("Answer a conversation", _ref("ChatBody"), streams)},
        "/v1/completions": {"post": _post("Continue a prompt", _ref("CompletionBody"), streams)},
        "/v1/models": {"get": _get("The served models")},
        "/v1/models/{name}": {"get": _get("One served model", _NAME)},
        "/tokenize": {"post": _post("Text or messages to token ids", _TEXTS["tokenize"])},
        "/detokenize": {"post": _post("Token ids to text", _TEXTS["detokenize"])},
        "/version": {"get": _get("The version of the server")},
        "/metrics": {"get": _get("Prometheus metrics", kind="text/plain")},
        **{
            path: {"get": _get("Whether the engine serves: 200, or 503", is_open=True)}
            for path in ("/health", "/ready", "/ping")
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "quire", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}


def _ref(model: str) -> dict[str, str]:
    return {"$ref": _REF.format(model=model)}


def _post(summary: str, body: dict[str, Any], more: dict[str, Any] | None = None) -> dict[str, Any]:
    content = {_JSON: {"schema": _OBJECT}, **(more or {})}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {_JSON: {"schema": body}}},
        "responses": _responses(content),
    }


def _get(
    summary: str,
    *parameters: dict[str, Any],
    kind: str = _JSON,
    is_open: bool = False,
) -> dict[str, Any]:
    schema = _OBJECT if kind == _JSON else {"type": "string"}
    made: dict[str, Any] = {"summary": summary, "responses": _responses({kind: {"schema": schema}})}
    if parameters:
        made["parameters"] = list(parameters)
    if is_open:
        made["security"] = []
        made["responses"]["503"]["content"] = {_JSON: {"schema": _OBJECT}}
    return made


def _responses(content: dict[str, Any]) -> dict[str, Any]:
    error = {_JSON: {"schema": _ref("Error")}}
    return {
        "200": {"description": "the answer", "content": content},
        **{str(s): {"description": why, "content": dict(error)} for s, why in _ERRORS.items()},
    }
