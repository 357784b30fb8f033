"""Lines of OpenAI's batch files: {custom_id, method, url, body}, in OpenAI's names.

Follows the Batch and Chat Completions references at platform.openai.com/docs/api-reference; what is
not honoured is refused by name, null is "not given". SamplingParams' own fields (top_k, min_p, …)
are taken too, as vLLM does.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ...engine.errors import RequestError
from .line_request import (
    SAMPLING_FIELDS,
    LineRequest,
    bias_by_token,
    refuse_unknown,
    template_variables,
)

_ENVELOPE = ("custom_id", "method", "url", "body")
_COMMON = ("model", "stream")
_CHAT = (
    "messages",
    "max_completion_tokens",
    "top_logprobs",
    "tools",
    "tool_choice",
    "chat_template_kwargs",
)
# Known to OpenAI and not to SamplingParams: no nearest name would help.
_NOT_HONOURED = (
    "audio",
    "echo",
    "function_call",
    "functions",
    "metadata",
    "modalities",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",
    "suffix",
    "user",
    "verbosity",
    "web_search_options",
)


def is_openai(fields: Mapping[str, Any]) -> bool:
    """Whether a line is meant as one of OpenAI's, sound or not."""
    return any(name in fields for name in _ENVELOPE)


def read_openai(fields: Mapping[str, Any]) -> LineRequest:
    """Raises RequestError with the field."""
    for name in fields:
        if name not in _ENVELOPE:
            raise RequestError(
                f"{name} stands beside {', '.join(_ENVELOPE)}; put what the request asks for into "
                "body",
                field=name,
            )
    if fields.get("method", "POST") != "POST":
        raise RequestError(
            f'method must be "POST", got {fields["method"]!r:.80}; or leave it out', field="method"
        )
    url, body = fields.get("url"), fields.get("body")
    if not isinstance(url, str) or url not in _READERS:
        raise RequestError(
            f"url must be {' or '.join(_READERS)}, got {url!r:.80}; other endpoints are not "
            "available",
            field="url",
        )
    if not isinstance(body, Mapping):
        raise RequestError(
            f"body must be an object with the request, got {type(body).__name__}", field="body"
        )
    given = {name: value for name, value in body.items() if value is not None}
    if given.get("stream", False) is not False:
        raise RequestError(
            "stream must be false or absent: results of a batch are whole; leave it out",
            field="stream",
        )
    if not isinstance(given.get("model", ""), str):
        raise RequestError(f"model must be a string, got {given['model']!r:.80}", field="model")
    for name in given:
        if name in _NOT_HONOURED:
            raise RequestError(f"{name} is not honoured; leave it out", field=name)
    return _READERS[url](given)


def _read_chat(body: Mapping[str, Any]) -> LineRequest:
    own = (*_COMMON, *_CHAT)
    refuse_unknown(body, (*own, *SAMPLING_FIELDS), own)
    if "messages" not in body:
        raise RequestError("body has no messages; a chat needs at least one", field="messages")
    sampling, spelled = _sampling(body), {}
    if "max_completion_tokens" in body:
        if "max_tokens" in body:
            raise RequestError(
                "max_tokens and max_completion_tokens are the same; keep max_completion_tokens",
                field="max_tokens",
            )
        sampling["max_tokens"] = body["max_completion_tokens"]
        spelled["max_tokens"] = "max_completion_tokens"
    sampling["logprobs"] = _chat_logprobs(body)
    if "top_logprobs" in body:
        spelled["logprobs"] = "top_logprobs"
    choice = body.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise RequestError(
            f'tool_choice must be "auto" or "none", got {choice!r:.80}; a call cannot be forced',
            field="tool_choice",
        )
    return LineRequest(
        messages=body["messages"],
        tools=body.get("tools") if choice == "auto" else None,
        chat_template_kwargs=template_variables(body.get("chat_template_kwargs")),
        sampling=sampling,
        defaults={"max_tokens": None},  # the rest of the context
        spelled=spelled,
        echo=_echo(body),
    )


def _read_completion(body: Mapping[str, Any]) -> LineRequest:
    own = (*_COMMON, "prompt")
    refuse_unknown(body, (*own, *SAMPLING_FIELDS), own)
    prompt = body.get("prompt")
    if not isinstance(prompt, str | list):
        raise RequestError(
            f"prompt must be a string or a list of token ids, got {type(prompt).__name__}",
            field="prompt",
        )
    return LineRequest(prompt=prompt, sampling=_sampling(body), echo=_echo(body))


_READERS: dict[str, Callable[[Mapping[str, Any]], LineRequest]] = {
    "/v1/chat/completions": _read_chat,
    "/v1/completions": _read_completion,
}


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    sampling = {name: value for name, value in body.items() if name in SAMPLING_FIELDS}
    if "logit_bias" in sampling:
        sampling["logit_bias"] = bias_by_token(sampling["logit_bias"])
    return sampling


def _chat_logprobs(body: Mapping[str, Any]) -> int | None:
    """A chat's logprobs is a switch, and top_logprobs the number beside the chosen token."""
    wants, top = body.get("logprobs", False), body.get("top_logprobs")
    if not isinstance(wants, bool):
        raise RequestError(
            f"logprobs must be true or false in a chat, got {wants!r:.80}; the number goes into "
            "top_logprobs",
            field="logprobs",
        )
    if top is None:
        return 0 if wants else None
    if not wants:
        raise RequestError("top_logprobs needs logprobs to be true", field="top_logprobs")
    if isinstance(top, bool) or not isinstance(top, int) or top < 0:
        raise RequestError(
            f"top_logprobs must be a whole number, 0 or more, got {top!r:.80}", field="top_logprobs"
        )
    return top


def _echo(body: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": body["model"]} if "model" in body else {}
