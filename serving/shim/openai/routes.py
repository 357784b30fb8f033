"""The routes of OpenAI's dialect."""

import reprlib
from collections.abc import Sequence
from typing import Any

import grpc
from pydantic import ValidationError

from ....protos.quire.v1 import inference_pb2 as pb
from ..engine import AnyRequest, Engine
from ..http import Receive, Reply, Scope, read_json_object, unless_client_goes
from .answers import CHAT, COMPLETION, Head, Shape
from .calls import Call, Wants
from .echo import Echoes
from .errors import HttpError
from .fields import check_rest
from .requests import (
    ChatBody,
    CompletionBody,
    Sampling,
    chat_request,
    completion_requests,
    prompts_of,
)

MAX_PROMPTS = 1024


class OpenAI:
    """Handlers, each for one route: scope and ends of the connection, and the caller's key."""

    def __init__(
        self, engine: Engine, *, refuses_unknown: bool = True, response_role: str = "assistant"
    ) -> None:
        self._engine = engine
        self._role = response_role
        self._refuses_unknown = refuses_unknown

    async def chat_completions(
        self, scope: Scope, receive: Receive, reply: Reply, key: str | None
    ) -> None:
        body = self._read(ChatBody, await read_json_object(scope, receive))
        try:
            request = chat_request(body)
            wants = Wants.of(body, [])
            await self._answer((receive, reply), CHAT, body, wants, [request], key)
        except HttpError as error:
            if body.max_completion_tokens is None:
                raise
            raise error.renamed("max_tokens", "max_completion_tokens") from error

    async def completions(
        self, scope: Scope, receive: Receive, reply: Reply, key: str | None
    ) -> None:
        body = self._read(CompletionBody, await read_json_object(scope, receive))
        prompts = prompts_of(body)
        if len(prompts) > MAX_PROMPTS:
            raise HttpError.bad_request(
                f"prompt has {len(prompts)} entries, at most {MAX_PROMPTS} are allowed; send them "
                "in several calls",
                param="prompt",
            )
        echoes = await Echoes(body, self._engine, key).all() if body.echo else []
        if echoes:
            prompts = [echo.token_ids for echo in echoes]
        requests = completion_requests(body, prompts)
        wants = Wants.of(body, echoes)
        await self._answer((receive, reply), COMPLETION, body, wants, requests, key)

    async def models(self, scope: Scope, receive: Receive, reply: Reply, key: str | None) -> None:
        found = await self._listed(key)
        await reply.json({"object": "list", "data": found})

    async def model(self, scope: Scope, receive: Receive, reply: Reply, key: str | None) -> None:
        name = scope["path_params"]["name"]
        for one in await self._listed(key):
            if one["id"] == name:
                await reply.json(one)
                return
        raise HttpError.of_code(
            grpc.StatusCode.NOT_FOUND, f"the model {name!r:.200} is not served here", "model"
        )

    # Inside

    def _read[B: Sampling](self, kind: type[B], value: dict[str, Any]) -> B:
        try:
            body = kind.model_validate(value)
        except ValidationError as error:
            raise _refusal(error) from error
        rest = dict(body.model_extra or {})
        if rest.get("best_of") == (body.n or 1):
            del rest["best_of"]
        check_rest(rest, kind.model_fields, refuses_unknown=self._refuses_unknown)
        if value.get("stream_options") is not None and not body.stream:
            raise HttpError.bad_request(
                "stream_options is for streamed answers; leave it out, or set stream: true",
                param="stream_options",
                code="invalid_value",
            )
        if body.stream and body.prompt_logprobs is not None:
            raise HttpError.bad_request(
                "prompt_logprobs come with whole answers alone; leave it out, or set stream: false",
                param="prompt_logprobs",
                code="invalid_value",
            )
        return body

    async def _answer(
        self,
        connection: tuple[Receive, Reply],
        shape: Shape,
        body: ChatBody | CompletionBody,
        wants: Wants,
        requests: Sequence[AnyRequest],
        key: str | None,
    ) -> None:
        receive, reply = connection
        head = Head(shape, reply.request_id, body.model or await self._default(key), self._role)
        answers = self._engine.open(key, wants.num_logprobs)
        try:
            for request in requests:
                answers.submit(request)
            call = Call(head, wants, answers)
            if body.stream:
                await unless_client_goes(receive, reply.events(call.stream()))
            else:

                async def whole() -> None:
                    await reply.json(await call.whole())

                await unless_client_goes(receive, whole())
        finally:
            answers.close()

    async def _default(self, key: str | None) -> str:
        """The first served name."""
        return str((await self._listed(key))[0]["id"])

    async def _listed(self, key: str | None) -> list[dict[str, Any]]:
        request = pb.ListModelsRequest()
        found = await self._engine.call(self._engine.stub.ListModels, request, key)
        return [
            {
                "id": one.name,
                "object": "model",
                "created": one.created_unix_ns // 10**9,
                "owned_by": "quire",
                "root": one.name,
                "parent": None,
                "max_model_len": one.max_model_len,
            }
            for one in found.models
        ]


def _refusal(error: ValidationError) -> HttpError:
    """The first of its findings; OpenAI's clients expect one."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = [str(part) for part in first["loc"]]
    param = ".".join(where) or None
    shown = reprlib.repr(first["input"])
    message = f"{param or 'the body'}: {first['msg']} ({first['type']}), got {shown}"
    return HttpError.bad_request(message, param=where[0] if where else None, code="invalid_value")
