"""Routes that belong to no dialect alone: health, version, metrics, and text to tokens and back."""

import reprlib
from collections.abc import Callable
from typing import Any

import grpc
import orjson

from ... import __version__
from ...protos.quire.v1 import inference_pb2 as pb
from .engine import Engine
from .http import Receive, Reply, Scope, read_json_object
from .openai.errors import HttpError, field_of
from .openai.requests import message_of, set_field
from .openapi import document

_HEALTH_TIMEOUT_S = 2.0
_MAX_TOKEN_STRS = 1024
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ServerRoutes:
    """Handlers, each for one route."""

    def __init__(self, engine: Engine, *, refuses_unknown: bool = True) -> None:
        self._engine = engine
        self._refuses_unknown = refuses_unknown
        self._document: bytes | None = None

    async def health(self, _: Scope, __: Receive, reply: Reply, ___: str | None) -> None:
        """200 exactly when the engine serves."""
        if await self._engine.is_serving(_HEALTH_TIMEOUT_S):
            await reply.json({"status": "ok"})
        else:
            why = {"status": "the engine is starting, stuck, stopping or gone"}
            await reply.json(why, 503, {"retry-after": "1"})

    async def version(self, _: Scope, __: Receive, reply: Reply, key: str | None) -> None:
        # Asked of the engine, which knows the keys.
        await self._engine.call(self._engine.stub.GetServerInfo, pb.GetServerInfoRequest(), key)
        await reply.json({"version": __version__})

    async def metrics(self, _: Scope, __: Receive, reply: Reply, key: str | None) -> None:
        found = await self._engine.call(self._engine.stub.GetMetrics, pb.GetMetricsRequest(), key)
        await reply.raw(found.text.encode(), _METRICS_TYPE)

    async def openapi(self, _: Scope, __: Receive, reply: Reply, ___: str | None) -> None:
        if self._document is None:  # 10 ms that no start needs
            self._document = orjson.dumps(document(refuses_unknown=self._refuses_unknown))
        await reply.raw(self._document, "application/json")

    async def tokenize(self, scope: Scope, receive: Receive, reply: Reply, key: str | None) -> None:
        """vLLM's {prompt} or {messages}."""
        body = await read_json_object(scope, receive)
        known = ("model", "prompt", "messages", "add_special_tokens", "add_generation_prompt")
        _refuse_unknown(body, (*known, "return_token_strs"))
        request = pb.TokenizeRequest()
        set_field(request, "model", _text(body, "model") or "")
        prompt = _text(body, "prompt")
        if (prompt is None) == (body.get("messages") is None):
            got = "neither" if prompt is None else "both"
            raise HttpError.bad_request(
                f"send either prompt or messages, got {got}", param="prompt", code="invalid_value"
            )
        # Templates write them.
        adds_special_tokens = _flag(body, "add_special_tokens", prompt is not None)
        opens_turn = _flag(body, "add_generation_prompt", True)
        if prompt is not None:
            set_field(request, "text", prompt, "prompt")
            request.add_special_tokens = adds_special_tokens
        else:
            for index, one in enumerate(_objects(body, "messages")):
                request.chat.messages.append(message_of(one, index))
            request.chat.add_generation_prompt = opens_turn
            request.chat.add_special_tokens = adds_special_tokens
        found = await self._engine.call(self._engine.stub.Tokenize, request, key)
        tokens = list(found.token_ids)
        texts = None
        if _flag(body, "return_token_strs", False):
            if len(tokens) > _MAX_TOKEN_STRS:
                raise HttpError.bad_request(
                    f"return_token_strs gives the texts of at most {_MAX_TOKEN_STRS} tokens, and "
                    f"these are {len(tokens)}; send less text",
                    param="return_token_strs",
                )
            texts = [(await self._detokenized([token], key)) for token in tokens]
        await reply.json(
            {
                "count": len(tokens),
                "max_model_len": found.max_model_len,
                "tokens": tokens,
                "token_strs": texts,
            },
        )

    async def detokenize(
        self, scope: Scope, receive: Receive, reply: Reply, key: str | None
    ) -> None:
        """vLLM's, llama-server's and SGLang's clients each look for another name of the text."""
        body = await read_json_object(scope, receive)
        _refuse_unknown(body, ("model", "tokens"))
        tokens = _token_ids(body, "tokens")
        try:
            text = await self._detokenized(tokens, key, _text(body, "model") or "")
        except grpc.aio.AioRpcError as error:
            if field_of(error) != "token_ids":
                raise
            raise HttpError.bad_request(
                error.details() or "", param="tokens", code="invalid_value"
            ) from error
        await reply.json({"prompt": text, "content": text, "text": text})

    async def _detokenized(self, tokens: list[int], key: str | None, model: str = "") -> str:
        request = pb.DetokenizeRequest(token_ids=tokens, skip_special_tokens=False)
        set_field(request, "model", model)
        found = await self._engine.call(self._engine.stub.Detokenize, request, key)
        return str(found.text)


def _refuse_unknown(body: dict[str, Any], known: tuple[str, ...]) -> None:
    for name in body:
        if name not in known:
            raise HttpError.bad_request(
                f"Unrecognized request argument: {name[:80]} (this route has {', '.join(known)})",
                param=name[:80],
                code="unknown_parameter",
            )


def _text(body: dict[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise _wrong(name, "must be a string", value)
    return value


def _flag(body: dict[str, Any], name: str, default: bool) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(name, "must be true or false", value)
    return default if value is None else value


def _objects(body: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return _list(body, name, "objects", lambda one: isinstance(one, dict))


def _token_ids(body: dict[str, Any], name: str) -> list[int]:
    def is_token_id(one: Any) -> bool:
        return type(one) is int and 0 <= one < 2**32

    return _list(body, name, "token ids, as /tokenize gives them", is_token_id)


def _list(body: dict[str, Any], name: str, of: str, is_one: Callable[[Any], bool]) -> list[Any]:
    value = body.get(name)
    if isinstance(value, list):
        wrong = [one for one in value if not is_one(one)]
        if not wrong:
            return value
        value = wrong[0]
    raise _wrong(name, f"must be a list of {of}", value)


def _wrong(name: str, rule: str, value: object) -> HttpError:
    return HttpError.bad_request(
        f"{name} {rule}, got {reprlib.repr(value)}", param=name, code="invalid_value"
    )
