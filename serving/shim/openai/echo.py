"""Prompts that come back at the start of their answers (`echo`), as evaluation tools ask for."""

from dataclasses import dataclass
from typing import Any

from ....protos.quire.v1 import inference_pb2 as pb
from ..engine import Engine
from .requests import DEFAULT_MAX_TOKENS, CompletionBody, extend_field, prompts_of, set_field


@dataclass(frozen=True)
class Echo:
    """A prompt. first_token: the text of its first token, which has no logprob."""

    text: str
    token_ids: list[int]
    first_token: str


class Echoes:
    """Asks the engine for the prompts of one call in its own words."""

    def __init__(self, body: CompletionBody, engine: Engine, key: str | None) -> None:
        self._body = body
        self._engine = engine
        self._key = key

    async def all(self) -> list[Echo]:
        """One for each prompt. Raises AioRpcError."""
        return [await self._echo(prompt) for prompt in prompts_of(self._body)]

    async def _echo(self, prompt: str | list[int]) -> Echo:
        most = self._body.truncate_prompt_tokens
        whole: Any = None
        if isinstance(prompt, str) or most == -1:
            whole = await self._tokens_of(prompt)
        token_ids = prompt if isinstance(prompt, list) else list(whole.token_ids)
        if most == -1:
            answer = self._body.max_tokens
            most = whole.max_model_len - (DEFAULT_MAX_TOKENS if answer is None else answer or 1)
        kept = token_ids if most is None or most < 1 else token_ids[-most:]
        text = prompt if isinstance(prompt, str) else None
        if text is None or len(kept) < len(token_ids):
            text = await self._text_of(kept)
        return Echo(text, kept, await self._text_of(kept[:1]))

    async def _tokens_of(self, prompt: str | list[int]) -> Any:
        """Of token ids, nothing but the context's length is asked."""
        text = prompt if isinstance(prompt, str) else ""
        request = pb.TokenizeRequest()
        set_field(request, "model", self._body.model or "")
        set_field(request, "text", text, "prompt")
        if self._body.add_special_tokens is not None:
            request.add_special_tokens = self._body.add_special_tokens
        return await self._engine.call(self._engine.stub.Tokenize, request, self._key)

    async def _text_of(self, token_ids: list[int]) -> str:
        request = pb.DetokenizeRequest(skip_special_tokens=False)
        set_field(request, "model", self._body.model or "")
        extend_field(request.token_ids, "prompt", token_ids)
        found: Any = await self._engine.call(self._engine.stub.Detokenize, request, self._key)
        return str(found.text)
