"""From a message of quire.v1 to a request that the core can run, or to what is wrong with it.

Pure functions of a model's text files and limits; where they run, and who may ask, is the intake's.
Values are checked where LLM checks them: SamplingParams, `check_text_request`,
`check_token_request`.
"""

from dataclasses import dataclass
from typing import Any

from ...engine.errors import ContextExceeded, RequestError, UnknownModel
from ...engine.sampling_params import SamplingParams
from ...engine.text.chat_template import RESERVED_VARIABLES
from ...engine.text.validate import TextRequest, check_text_request
from ...engine.text_files import TextFiles
from ...engine.token_checks import TokenLimits, check_token_request
from ...protos.quire.v1 import inference_pb2
from ..core_client.params import params_from_proto
from ..strict_json import read_json, read_object

AnyRequest = inference_pb2.GenerateRequest | inference_pb2.ChatRequest

MAX_ID_BYTES = 128
MAX_SALT_BYTES = 128
MAX_MESSAGES = 4096
MAX_KWARGS_BYTES = 64 << 10
MAX_TOOLS_BYTES = 1 << 20


@dataclass(frozen=True)
class Served:
    """What the checks need to know of the model. names: those that requests may use."""

    files: TextFiles
    names: tuple[str, ...]
    limits: TokenLimits
    takes_priorities: bool = False


def check_envelope(message: AnyRequest, served: Served) -> None:
    """What can be refused before any work is done. Raises RequestError."""
    check_model(message.model, served)
    _check_bytes("request_id", message.request_id, MAX_ID_BYTES)
    _check_bytes("cache_salt", message.cache_salt, MAX_SALT_BYTES)
    if isinstance(message, inference_pb2.ChatRequest):
        _check_bytes(
            "chat_template_kwargs_json", message.chat_template_kwargs_json, MAX_KWARGS_BYTES
        )
        _check_bytes("tools_json", message.tools_json, MAX_TOOLS_BYTES)
    elif len(message.token_ids.ids) >= served.limits.max_model_len and not (
        message.truncate_prompt_tokens == -1
        or 0 < message.truncate_prompt_tokens < served.limits.max_model_len
    ):
        # Here, before all of them are looked at; with the words of the check of those that fit.
        raise ContextExceeded(
            f"the prompt has {len(message.token_ids.ids)} tokens, but the context is "
            f"{served.limits.max_model_len} and needs room for an answer; shorten the prompt",
            field="token_ids",
        )
    if message.priority and not served.takes_priorities:
        raise RequestError(
            f"priority is {message.priority}, but this server does not order requests by it; "
            "leave it out, or start the server with --scheduling-policy priority",
            field="priority",
        )


def check_model(name: str, served: Served) -> None:
    if name and name not in served.names:
        raise UnknownModel(
            f"the model {name[:200]!r} is not served here; this server has "
            f"{', '.join(served.names)}",
            field="model",
        )


def text_size(message: AnyRequest) -> int:
    """Bytes or ids that the prompt is made of: what preparing it will cost."""
    if isinstance(message, inference_pb2.ChatRequest):
        return int(message.ByteSize())
    return len(message.text) + len(message.token_ids.ids)


def prepare(message: AnyRequest, served: Served) -> TextRequest:
    """The request, checked and encoded. Takes as long as encoding does. Raises RequestError."""
    try:
        return _prepared(message, served)
    except RequestError as error:
        if error.field in ("prompt", "prompt_token_ids"):  # LLM's names of what came here as …
            error.field = _prompt_field(message)
        raise


def _prompt_field(message: AnyRequest) -> str:
    if isinstance(message, inference_pb2.ChatRequest):
        return "messages"
    return message.WhichOneof("prompt") or "prompt"


def _prepared(message: AnyRequest, served: Served) -> TextRequest:
    params = params_from_proto(message.sampling_params, served.files.default_sampling)
    keep_last = _kept(message, params, served.limits)
    if isinstance(message, inference_pb2.ChatRequest):
        prompt: Any = render(message, served.files)
        adds_special_tokens = message.add_special_tokens
    else:
        prompt = _prompt(message, keep_last)
        adds_special_tokens = _true_unless_set(message, "add_special_tokens")
    checked = check_text_request(
        prompt,
        params,
        served.files.tokenizer,
        max_model_len=served.limits.max_model_len,
        add_special_tokens=adds_special_tokens,
        keep_last=keep_last,
    )
    resolved = check_token_request(checked.prompt_token_ids, checked.params, served.limits)
    return TextRequest(checked.prompt, checked.prompt_token_ids, resolved, checked.bad_word_ids)


def render(message: inference_pb2.ChatRequest, files: TextFiles) -> str:
    """The conversation as one text. Raises RequestError."""
    if len(message.messages) > MAX_MESSAGES:
        raise RequestError(
            f"messages has {len(message.messages)} entries, at most {MAX_MESSAGES} are allowed; "
            "send fewer",
            field="messages",
        )
    messages = [_message(one, f"messages[{i}]") for i, one in enumerate(message.messages)]
    if message.continue_final_message and messages and messages[-1]["role"] != "assistant":
        raise RequestError(
            "continue_final_message goes on with the assistant's message, but the last one has the "
            f"role {messages[-1]['role']!r:.80}; leave it out, or add the answer's beginning",
            field="continue_final_message",
        )
    opens_turn = not message.continue_final_message
    if message.HasField("add_generation_prompt"):
        opens_turn = message.add_generation_prompt
    return files.tokenizer.apply_chat_template(
        messages,
        tools=_json(message.tools_json, "tools") if message.tools_json else None,
        add_generation_prompt=opens_turn,
        continue_final_message=message.continue_final_message,
        **_variables(message.chat_template_kwargs_json),
    )


def tokenize(message: inference_pb2.TokenizeRequest, served: Served) -> tuple[int, ...]:
    """Raises RequestError, also for a text that is far too long for the model."""
    check_model(message.model, served)
    kind = message.WhichOneof("input")
    if kind is None:
        raise RequestError("input is not set; send a text or a chat", field="input")
    if kind == "text" and not message.text:
        adds = _true_unless_set(message, "add_special_tokens")
        return tuple(served.files.tokenizer.encode("", adds))
    text, adds_special_tokens = message.text, _true_unless_set(message, "add_special_tokens")
    if kind == "chat":
        text = render(message.chat, served.files)
        adds_special_tokens = message.chat.add_special_tokens
    try:
        return check_text_request(
            text,
            SamplingParams(),
            served.files.tokenizer,
            max_model_len=served.limits.max_model_len,
            add_special_tokens=adds_special_tokens,
        ).prompt_token_ids
    except RequestError as error:
        error.field = kind
        raise


def detokenize(message: inference_pb2.DetokenizeRequest, served: Served) -> str:
    """Raises RequestError."""
    check_model(message.model, served)
    most = served.limits.max_model_len
    if len(message.token_ids) > most:
        raise ContextExceeded(
            f"token_ids has {len(message.token_ids)} entries, at most {most} (the model's context) "
            "are allowed; send them in parts",
            field="token_ids",
        )
    width = served.limits.logits_width
    if message.token_ids and max(message.token_ids) >= width:
        raise RequestError(
            f"token_ids has {max(message.token_ids)}, but this model's token ids are 0 to "
            f"{width - 1}",
            field="token_ids",
        )
    skips = _true_unless_set(message, "skip_special_tokens")
    return served.files.tokenizer.decode(message.token_ids, skips)


def _kept(message: AnyRequest, params: SamplingParams, limits: TokenLimits) -> int | None:
    """How many of the prompt's last tokens stay; None is all."""
    if not message.HasField("truncate_prompt_tokens"):
        return None
    most = int(message.truncate_prompt_tokens)
    if most == -1:
        most = limits.max_model_len - (params.max_tokens or 1)
        if most < 1:
            raise RequestError(
                f"truncate_prompt_tokens is -1, but max_tokens is {params.max_tokens} and the "
                f"context {limits.max_model_len}, so no prompt has room; lower max_tokens",
                field="truncate_prompt_tokens",
            )
    if most < 1:
        raise RequestError(
            f"truncate_prompt_tokens must be at least 1, or -1 for what the context has room for, "
            f"got {most}",
            field="truncate_prompt_tokens",
        )
    return most


def _true_unless_set(message: Any, field: str) -> bool:
    return not message.HasField(field) or bool(getattr(message, field))


def _prompt(message: inference_pb2.GenerateRequest, keep_last: int | None) -> dict[str, Any]:
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise RequestError("prompt is not set; send text or token_ids", field="prompt")
    if kind == "text":
        return {"prompt": message.text}
    ids = message.token_ids.ids
    return {"prompt_token_ids": tuple(ids if keep_last is None else ids[-keep_last:])}


def _message(message: inference_pb2.ChatMessage, where: str) -> dict[str, Any]:
    """Only what is set: a template tells an empty content from none."""
    one: dict[str, Any] = {"role": message.role}
    if message.HasField("content"):
        one["content"] = message.content
    for name in ("name", "tool_call_id"):
        if value := getattr(message, name):
            one[name] = value
    if message.tool_calls_json:
        field = f"{where}.tool_calls_json"
        calls = one["tool_calls"] = _json(message.tool_calls_json, field)
        if not isinstance(calls, list):
            raise RequestError(f"{field} must be a JSON array; write it in brackets", field=field)
    return one


def _json(text: str, field: str) -> Any:
    try:
        return read_json(text, field)
    except RequestError as error:
        error.field = field
        raise


def _variables(text: str) -> dict[str, Any]:
    if not text:
        return {}
    field = "chat_template_kwargs_json"
    try:
        variables = read_object(text, field)
    except RequestError as error:
        error.field = field
        raise
    for name in variables:
        if name in RESERVED_VARIABLES:
            raise RequestError(
                f"{field} may not set {name}, which follows from the request; leave it out",
                field=field,
            )
    return variables


def _check_bytes(name: str, text: str, most: int) -> None:
    num_bytes = len(text.encode())
    if num_bytes > most:
        raise RequestError(
            f"{name} has {num_bytes} bytes, at most {most} are allowed; shorten it", field=name
        )
