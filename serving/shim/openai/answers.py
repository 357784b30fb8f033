"""Answers in OpenAI's shapes: whole ones, and the chunks of streamed ones.

A chunk is spliced from prepared bytes and the JSON of its text: most of it is the same for every
token of an answer.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from ....protos.quire.v1 import inference_pb2 as pb

JsonObject = dict[str, Any]

_REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
    pb.FINISH_REASON_ERROR: "error",
}
LEAST_LOGPROB = -9999.0
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Shape:
    """What tells the two routes apart. kind: of the whole answer; chunk_kind: of a chunk."""

    prefix: str
    kind: str
    chunk_kind: str
    is_chat: bool


CHAT = Shape("chatcmpl", "chat.completion", "chat.completion.chunk", True)
COMPLETION = Shape("cmpl", "text_completion", "text_completion", False)


@dataclass
class Head:
    """What every part of one answer repeats."""

    shape: Shape
    id: str
    model: str
    role: str = "assistant"
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self) -> JsonObject:
        return {
            "id": f"{self.shape.prefix}-{self.id}",
            "object": self.shape.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    def chunk(self) -> JsonObject:
        return self.whole() | {"object": self.shape.chunk_kind}


def finish_reason(delta: pb.GenerateDelta | pb.Completion) -> str | None:
    return _REASONS.get(delta.finish_reason)


def stop_reason(delta: pb.GenerateDelta | pb.Completion) -> str | int | None:
    """Which stop text or token matched."""
    kind = delta.stop_reason.WhichOneof("reason")
    return None if kind is None else getattr(delta.stop_reason, kind)


def usage(summaries: Iterable[pb.Summary], *, only_prompts: bool) -> JsonObject:
    """Of all prompts of a call. only_prompts: tokens that were made besides are not counted."""
    summaries = list(summaries)
    prompt = sum(s.usage.prompt_tokens for s in summaries)
    output = 0 if only_prompts else sum(s.usage.completion_tokens for s in summaries)
    cached = sum(s.usage.cached_tokens for s in summaries)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def running_usage(prompt_tokens: int, output_tokens: int) -> JsonObject:
    """Of a stream so far."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
    }


def chat_logprobs(positions: Any, wanted: int, *, as_ids: bool) -> JsonObject:
    """The logprobs of a chat choice. wanted: how many alternatives were asked for, -1 for all."""
    content = []
    for position in positions:
        first, *_ = position.tokens
        entry = _chat_token(first, as_ids)
        top = sorted(position.tokens, key=lambda t: t.rank)
        shown = top if wanted < 0 else top[:wanted]
        entry["top_logprobs"] = [_chat_token(one, as_ids) for one in shown]
        content.append(entry)
    return {"content": content, "refusal": None}


def completion_logprobs(positions: Any, offset: int, *, as_ids: bool) -> JsonObject:
    """The four lists of a completion choice. offset: characters before its text."""
    tokens, values, tops, offsets = [], [], [], []
    for position in positions:
        if not position.tokens:  # the first token of a prompt: nothing comes before it
            continue
        first = position.tokens[0]
        text = _token_text(first, as_ids)
        tokens.append(text)
        values.append(_clamped(first.logprob))
        tops.append({_token_text(one, as_ids): _clamped(one.logprob) for one in position.tokens})
        offsets.append(offset)
        offset += len(first.text)
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def prompt_logprobs(message: pb.PromptLogprobs) -> list[JsonObject | None]:
    """vLLM's shape: for each prompt token, token id -> its logprob; null for the first."""
    return [
        {
            str(one.token_id): {
                "logprob": _clamped(one.logprob),
                "rank": one.rank,
                "decoded_token": one.text,
            }
            for one in position.tokens
        }
        or None
        for position in message.positions
    ]


def event(payload: JsonObject) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"


class Splicer:
    """Makes the chunks of one choice that have a text and nothing else."""

    def __init__(self, head: Head, index: int, *, has_usage: bool) -> None:
        mark = "\u0000"
        text: JsonObject = {"delta": {"content": mark}} if head.shape.is_chat else {"text": mark}
        choice = {"index": index} | text | {"logprobs": None, "finish_reason": None}
        payload = head.chunk() | {"choices": [choice]}
        if has_usage:
            payload["usage"] = None
        before, after = event(payload).split(orjson.dumps(mark))
        self._before, self._after = before, after

    def chunk(self, text: str) -> bytes:
        return self._before + orjson.dumps(text) + self._after


def _chat_token(one: pb.TokenLogprob, as_ids: bool) -> JsonObject:
    return {
        "token": _token_text(one, as_ids),
        "logprob": _clamped(one.logprob),
        # Of a token that is a part of a character, the text does not tell them.
        "bytes": None if "\ufffd" in one.text else list(one.text.encode()),
    }


def _token_text(one: pb.TokenLogprob, as_ids: bool) -> str:
    return f"token_id:{one.token_id}" if as_ids else one.text


def _clamped(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
