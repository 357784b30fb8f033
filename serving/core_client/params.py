"""SamplingParams as the message quire.v1.SamplingParams and back, on both sides of every wire.

Whole numbers of the wire have 32 bits; what does not fit is refused by name, never clamped.
"""

from collections.abc import Mapping
from typing import Any

from ...engine.errors import RequestError
from ...engine.sampling_params import SamplingParams
from ...protos.quire.v1 import inference_pb2

_SCALARS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "max_tokens",
    "logprobs",
    "prompt_logprobs",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)
_LISTS = ("stop", "stop_token_ids", "allowed_token_ids", "bad_words")


def params_to_proto(params: SamplingParams) -> inference_pb2.SamplingParams:
    """Every field set, so that no default of the other side comes in; None and empty are unset.

    Raises RequestError with the field when a number or a text cannot be carried.
    """
    message = inference_pb2.SamplingParams()
    name = ""
    try:
        for name in _SCALARS:
            value = getattr(params, name)
            if value is not None:
                setattr(message, name, value)
        for name in _LISTS:
            getattr(message, name).extend(getattr(params, name) or ())
        name = "logit_bias"
        for token_id, bias in (params.logit_bias or {}).items():
            message.logit_bias[token_id] = bias
    except ValueError as error:  # also what text that is not Unicode raises
        shown = repr(getattr(params, name))
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise RequestError(
            f"{name} must be whole numbers of 32 bits or text of Unicode characters to reach the "
            f"engine, got {shown} ({error}); send less or leave it out",
            field=name,
        ) from error
    return message


def params_from_proto(
    message: inference_pb2.SamplingParams, defaults: Mapping[str, Any] | None = None
) -> SamplingParams:
    """Unset fields take `defaults` (a model's generation_config.json), then the .proto's own, which
    are those of SamplingParams but for max_tokens: the rest of the context.

    Raises RequestError with the field.
    """
    given: dict[str, Any] = {"max_tokens": None, **(defaults or {})}
    for name in _SCALARS:
        if message.HasField(name):
            given[name] = getattr(message, name)
    for name in _LISTS:
        if values := getattr(message, name):
            given[name] = tuple(values)
    if message.logit_bias:
        given["logit_bias"] = dict(message.logit_bias)
    return SamplingParams(**given)
