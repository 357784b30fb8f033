"""The bodies of /v1/chat/completions and /v1/completions, and the requests of quire.v1 they become.

Types are checked here; ranges, ids and lengths are the engine's to check, once for all dialects.
"""

import json
import reprlib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ....protos.quire.v1 import inference_pb2 as pb
from . import kinds
from .errors import HttpError
from .examples import CHAT_EXAMPLES, COMPLETION_EXAMPLES
from .kinds import FirstError, JsonObject

_I64 = 2**63


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = Field(
        None, description="a last chunk with the usage, and null in the others"
    )
    continuous_usage_stats: bool | None = Field(
        None, description="with include_usage: the usage so far in every chunk"
    )
    include_obfuscation: bool | None = Field(None, description="without effect")


class Sampling(BaseModel):
    """Fields that both bodies have. Unset ones take the model's generation_config.json."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = Field(None, description="a served name; any if not given")
    stream: bool | None = Field(None, description="server-sent events as the answer is made")
    stream_options: StreamOptions | None = Field(None, description="of a streamed answer")
    max_tokens: kinds.Count | None = Field(
        None, description="most tokens of the answer; 0 with echo"
    )
    temperature: kinds.Temperature | None = Field(None, description="0 (greedy) to 2")
    top_p: kinds.PositiveShare | None = Field(
        None, description="over 0, to 1; the likeliest tokens that sum up to it"
    )
    top_k: kinds.TopK | None = Field(None, description="0 and -1 are off")
    min_p: kinds.Share | None = Field(
        None, description="0 to 1; least probability, as a share of the likeliest token's"
    )
    n: kinds.NumAnswers | None = Field(None, description="answers to make, 1 to 64")
    stop: kinds.SomeText | kinds.Stops | None = Field(
        None, description="at most 4 texts that end the answer, and are not part of it"
    )
    stop_token_ids: kinds.StopIds | None = Field(None, description="token ids that end the answer")
    include_stop_str_in_output: bool | None = Field(
        None, description="keep the text that ended the answer"
    )
    ignore_eos: bool | None = Field(None, description="go on after the end-of-sequence token")
    min_tokens: kinds.Count | None = Field(None, description="least tokens of the answer")
    presence_penalty: kinds.Penalty | None = Field(
        None, description="-2 to 2, of tokens that are in the answer already"
    )
    frequency_penalty: kinds.Penalty | None = Field(
        None, description="-2 to 2, of each time that they are"
    )
    repetition_penalty: kinds.Positive | None = Field(
        None, description="over 0; 1 is off; of tokens of prompt and answer"
    )
    logit_bias: kinds.Biases | None = Field(
        None, description="token id -> -100 to 100, added to its logit"
    )
    prompt_logprobs: kinds.MinusOneOrMore | None = Field(
        None,
        description="how many of the likeliest tokens to tell at each of the prompt's positions",
    )
    seed: int | None = Field(
        None, ge=-_I64, le=_I64 - 1, description="the same answer every time; drawn if not given"
    )
    allowed_token_ids: kinds.SomeIds | None = Field(None, description="only these may be sampled")
    bad_words: kinds.BadWords | None = Field(None, description="texts that must not be completed")
    skip_special_tokens: bool | None = Field(
        None, description="leave special tokens out of the text; true by default"
    )
    add_special_tokens: bool | None = Field(
        None, description="of the tokenizer; by default true for prompts, false for conversations"
    )
    truncate_prompt_tokens: kinds.NumKept | None = Field(
        None, description="most tokens of the prompt, the last ones; -1 is what fits"
    )
    priority: kinds.Priority | None = Field(
        None, description="lower goes first, with --scheduling-policy priority"
    )
    request_id: str | None = Field(
        None, description="at most 128 bytes; that of an open request is refused"
    )
    cache_salt: str | None = Field(
        None, description="cached prefixes are shared by requests of the same salt and key alone"
    )
    return_token_ids: bool | None = Field(
        None, description="the answer's token ids beside its text"
    )
    return_tokens_as_token_ids: bool | None = Field(
        None, description="tokens of logprobs as token_id:N"
    )


class Message(BaseModel):
    """One turn. Other fields, which SDKs send back, are passed over."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: str = Field(min_length=1)
    content: str | kinds.Parts | None = None
    name: str | None = None
    tool_calls: kinds.Objects | None = None
    tool_call_id: str | None = None


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    model_config = ConfigDict(json_schema_extra={"examples": CHAT_EXAMPLES})

    messages: Annotated[list[Message], FirstError()] = Field(
        min_length=1, max_length=4096, description="the conversation so far"
    )
    max_tokens: kinds.AtLeastOne | None = Field(None, description="most tokens of the answer")
    max_completion_tokens: kinds.AtLeastOne | None = Field(None, description="wins over max_tokens")
    logprobs: bool | None = Field(None, description="of the answer's tokens")
    top_logprobs: kinds.MinusOneOrMore | None = Field(
        None, description="how many of the likeliest tokens to tell, with logprobs"
    )
    echo: bool | None = Field(
        None, description="the last message before the answer, if it is the assistant's"
    )
    add_generation_prompt: bool | None = Field(
        None, description="whether the template opens the assistant's turn; true by default"
    )
    continue_final_message: bool | None = Field(
        None, description="go on with the last message, which is the assistant's"
    )
    chat_template_kwargs: JsonObject | None = Field(
        None, description="further variables of the chat template"
    )


class CompletionBody(Sampling):
    """POST /v1/completions."""

    model_config = ConfigDict(json_schema_extra={"examples": COMPLETION_EXAMPLES})

    prompt: kinds.Prompt = Field(description="a text, token ids, or a list of either")
    logprobs: kinds.MinusOneOrMore | None = Field(
        None, description="how many of the likeliest tokens to tell at each position"
    )
    echo: bool | None = Field(None, description="the prompt before the answer")


# Fields whose names and meanings are those of quire.v1.SamplingParams.
_SCALARS = (
    "n",
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "max_tokens",
    "prompt_logprobs",
    "skip_special_tokens",
)
DEFAULT_MAX_TOKENS = 16  # OpenAI's, of completions
_LISTS = ("stop_token_ids", "allowed_token_ids", "bad_words")


def chat_request(body: ChatBody) -> pb.ChatRequest:
    """Raises HttpError."""
    if body.top_logprobs is not None and not body.logprobs:
        raise HttpError.bad_request(
            "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value"
        )
    request = pb.ChatRequest(
        messages=[_message(one, index) for index, one in enumerate(body.messages)],
        continue_final_message=bool(body.continue_final_message),
    )
    if body.add_generation_prompt is not None:
        request.add_generation_prompt = body.add_generation_prompt
    if body.chat_template_kwargs:
        given = _compact(body.chat_template_kwargs)
        set_field(request, "chat_template_kwargs_json", given, "chat_template_kwargs")
    most = body.max_completion_tokens
    if most is not None:
        body = body.model_copy(update={"max_tokens": most})
    params = request.sampling_params
    _fill(params, body)
    if body.logprobs:
        set_field(params, "logprobs", body.top_logprobs or 0)
    _fill_envelope(request, body)
    return request


def last_of_assistant(body: ChatBody) -> str:
    """What `echo` puts before the answer: the last message, if it is of the same role."""
    last = body.messages[-1]
    return (_content(last.content, "messages") or "") if last.role == "assistant" else ""


def completion_requests(
    body: CompletionBody, prompts: list[str] | list[list[int]]
) -> list[pb.GenerateRequest]:
    """One for each prompt. Raises HttpError."""
    if body.echo and body.max_tokens == 0:
        body = body.model_copy(update={"max_tokens": 1})  # one is computed and not shown
    requests: list[pb.GenerateRequest] = []
    for prompt in prompts:
        request = pb.GenerateRequest()
        if isinstance(prompt, str):
            set_field(request, "text", prompt, "prompt")
        else:
            extend_field(request.token_ids.ids, "prompt", prompt)
        _fill(request.sampling_params, body)
        if body.max_tokens is None:
            request.sampling_params.max_tokens = DEFAULT_MAX_TOKENS
        if body.logprobs is not None:
            set_field(request.sampling_params, "logprobs", body.logprobs)
            if body.echo:
                set_field(request.sampling_params, "prompt_logprobs", body.logprobs)
        _fill_envelope(request, body)
        if body.request_id and len(prompts) > 1:
            request.request_id = f"{body.request_id}-{len(requests)}"
        requests.append(request)
    return requests


def prompts_of(body: CompletionBody) -> list[str] | list[list[int]]:
    """The prompts of the call: one, or those of a list. Raises HttpError."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    types = set(map(type, prompt)) if isinstance(prompt, list) else set()
    if types == {int}:
        return [prompt]
    if types == {str}:
        return list(prompt)
    if types == {list} and all(set(map(type, one)) == {int} for one in prompt):
        return list(prompt)
    raise HttpError.bad_request(
        "prompt must be a text, a list of token ids, or a list of either, none of them empty",
        param="prompt",
        code="invalid_value",
    )


def _fill_envelope(request: pb.ChatRequest | pb.GenerateRequest, body: Sampling) -> None:
    for name in ("model", "request_id", "cache_salt"):
        set_field(request, name, getattr(body, name) or "")
    set_field(request, "priority", body.priority or 0)
    for name in ("add_special_tokens", "truncate_prompt_tokens"):
        value = getattr(body, name)
        if value is not None:
            set_field(request, name, value)


def _fill(params: pb.SamplingParams, body: Sampling) -> None:
    for name in _SCALARS:
        value = getattr(body, name)
        if value is not None:
            set_field(params, name, value)
    if body.top_k is not None:
        set_field(params, "top_k", 0 if body.top_k == -1 else body.top_k)
    if body.allowed_token_ids == []:
        # quire.v1 has no word for it: there an empty list is an unset one.
        raise HttpError.bad_request(
            "allowed_token_ids is empty, so no token could be chosen; list at least one id or "
            "leave it out",
            param="allowed_token_ids",
            code="invalid_value",
        )
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    extend_field(params.stop, "stop", stops)
    for name in _LISTS:
        extend_field(getattr(params, name), name, getattr(body, name) or [])
    for key, bias in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 11):
            raise HttpError.bad_request(
                f"logit_bias has the key {key!r:.80}; keys are token ids, written like "
                '{"1234": -100}',
                param="logit_bias",
                code="invalid_value",
            )
        try:
            params.logit_bias[int(key)] = bias
        except ValueError as error:
            raise _unfit("logit_bias", key) from error


def set_field(message: Any, name: str, value: object, param: str | None = None) -> None:
    """param: the caller's name of it, if it is another. Raises HttpError for what does not fit."""
    try:
        setattr(message, name, value)
    except (ValueError, UnicodeError) as error:
        raise _unfit(param or name, value) from error


def extend_field(field: Any, name: str, values: list[Any]) -> None:
    """A list of a message. Raises HttpError for what does not fit."""
    try:
        field.extend(values)
    except ValueError as error:
        raise _unfit(name, values) from error


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _unfit(name: str, value: object) -> HttpError:
    return HttpError.bad_request(
        f"{name} must be in range for a 32-bit number, 0 or more, and text must be Unicode; got "
        f"{reprlib.repr(value)}",
        param=name,
        code="invalid_value",
    )


def message_of(value: JsonObject, index: int) -> pb.ChatMessage:
    """One entry of a list of messages. Raises HttpError."""
    try:
        return _message(Message.model_validate(value), index)
    except ValidationError as error:
        raise HttpError.bad_request(
            f"messages[{index}]: {error.errors()[0]['msg']}", param="messages"
        ) from error


def _message(one: Message, index: int) -> pb.ChatMessage:
    # What OpenAI calls developer, templates know as system.
    role: Literal["system"] | str = "system" if one.role == "developer" else one.role
    message = pb.ChatMessage()
    for name, value in (
        ("role", role),
        ("content", _content(one.content, f"messages[{index}].content")),
        ("name", one.name),
        ("tool_call_id", one.tool_call_id),
    ):
        if value is not None:
            set_field(message, name, value, f"messages[{index}].{name}")
    if one.tool_calls:
        calls = _compact(one.tool_calls)
        set_field(message, "tool_calls_json", calls, f"messages[{index}].tool_calls")
    return message


def _content(content: str | list[JsonObject] | None, where: str) -> str | None:
    """Text parts are joined by newlines, as vLLM does."""
    if content is None or isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        text = part.get("text")
        if part.get("type") != "text" or not isinstance(text, str):
            raise HttpError.bad_request(
                f'{where}[{index}] must be {{"type": "text", "text": …}}, got type '
                f"{part.get('type')!r:.80}; only text is understood",
                param=f"{where}[{index}]",
                code="unsupported_content",
            )
        texts.append(text)
    return "\n".join(texts)
