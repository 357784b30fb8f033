"""Prompts that come back at the start of their answers (`echo`), as evaluation tools ask for."""

from dataclasses import dataclass
from typing import Any

from ....protos.quire.v1 import inference_pb2 as pb
from ..engine import Engine
from .requests import CompletionBody, prompts_of


@dataclass(frozen=True)
class Echo:
    """A prompt. first_token: the text of its first token, which has no logprob."""

    text: str
    token_ids: list[int]
    first_token: str


async def echoes_of(body: CompletionBody, engine: Engine, key: str | None) -> list[Echo]:
    """One for each prompt of the call, in the engine's words. Raises AioRpcError."""
    return [await _echo(prompt, body.model or "", engine, key) for prompt in prompts_of(body)]


async def _echo(prompt: str | list[int], model: str, engine: Engine, key: str | None) -> Echo:
    async def text_of(token_ids: list[int]) -> str:
        request = pb.DetokenizeRequest(model=model, token_ids=token_ids, skip_special_tokens=False)
        found: Any = await engine.call(engine.stub.Detokenize, request, key)
        return str(found.text)

    if isinstance(prompt, str):
        request = pb.TokenizeRequest(model=model, text=prompt)
        found: Any = await engine.call(engine.stub.Tokenize, request, key)
        token_ids = list(found.token_ids)
        return Echo(prompt, token_ids, await text_of(token_ids[:1]))
    return Echo(await text_of(prompt), prompt, await text_of(prompt[:1]))
