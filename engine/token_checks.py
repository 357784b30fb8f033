"""The token-level check of a request: ids against the logits width, lengths against the context.

Knows a model only as three numbers. Text, tokenizers and stop strings are `text/validate.py`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors import ContextExceeded, RequestError
from .sampling_params import SamplingParams


@dataclass(frozen=True)
class TokenLimits:
    """logits_width: ids the model can read and give. max_logprobs: None means unlimited."""

    logits_width: int
    max_model_len: int
    max_logprobs: int | None = 20

    def __post_init__(self) -> None:
        if self.max_logprobs == -1:  # as the option spells it
            object.__setattr__(self, "max_logprobs", None)


def check_token_request(
    prompt_token_ids: Sequence[int], params: SamplingParams, limits: TokenLimits
) -> SamplingParams:
    """The params with max_tokens resolved to a number that fits into the context.

    Raises RequestError with the field. Cost: two passes over the prompt at C speed.
    """
    _check_prompt(prompt_token_ids, limits)
    _check_ids("stop_token_ids", params.stop_token_ids, limits.logits_width)
    _check_ids("logit_bias", params.logit_bias or (), limits.logits_width)
    _check_ids("allowed_token_ids", params.allowed_token_ids or (), limits.logits_width)
    _check_logprobs("logprobs", params.logprobs, limits.max_logprobs)
    _check_logprobs("prompt_logprobs", params.prompt_logprobs, limits.max_logprobs)
    room = limits.max_model_len - len(prompt_token_ids)
    if params.min_tokens > room:
        raise RequestError(
            f"min_tokens is {params.min_tokens}, but a prompt of {len(prompt_token_ids)} tokens "
            f"leaves room for {room} in the context of {limits.max_model_len}; shorten the prompt "
            "or lower min_tokens",
            field="min_tokens",
        )
    if params.max_tokens is not None and params.max_tokens <= room:
        return params
    return dataclasses.replace(params, max_tokens=room)


def _check_prompt(prompt_token_ids: Sequence[int], limits: TokenLimits) -> None:
    if not isinstance(prompt_token_ids, (list, tuple)):
        raise RequestError(
            f"prompt_token_ids must be a list of token ids, got {type(prompt_token_ids).__name__}",
            field="prompt_token_ids",
        )
    if not prompt_token_ids:
        raise RequestError(
            "the prompt has no tokens, so there is nothing to continue; send at least one token, "
            "for example the beginning-of-sequence token",
            field="prompt_token_ids",
        )
    if len(prompt_token_ids) >= limits.max_model_len:
        raise ContextExceeded(
            f"the prompt has {len(prompt_token_ids)} tokens, but the context is "
            f"{limits.max_model_len} and needs room for an answer; shorten the prompt to "
            f"{limits.max_model_len - 1} tokens or fewer, or start the engine with a larger "
            "max_model_len",
            field="prompt_token_ids",
        )
    if set(map(type, prompt_token_ids)) != {int}:
        position = next(i for i, x in enumerate(prompt_token_ids) if type(x) is not int)
        raise RequestError(
            f"prompt_token_ids[{position}] must be an int, got {prompt_token_ids[position]!r} of "
            f"type {type(prompt_token_ids[position]).__name__}; convert it with int()",
            field="prompt_token_ids",
        )
    if min(prompt_token_ids) < 0 or max(prompt_token_ids) >= limits.logits_width:
        position = next(
            i for i, x in enumerate(prompt_token_ids) if not 0 <= x < limits.logits_width
        )
        raise RequestError(
            f"prompt_token_ids[{position}] is {prompt_token_ids[position]}, but this model's "
            f"token ids are 0 to {limits.logits_width - 1}; was the prompt made with another "
            "tokenizer?",
            field="prompt_token_ids",
        )


def _check_ids(field: str, token_ids: Iterable[int], logits_width: int) -> None:
    for token_id in token_ids:
        if token_id >= logits_width:
            raise RequestError(
                f"{field} has the token id {token_id}, but this model's token ids are 0 to "
                f"{logits_width - 1}; leave it out",
                field=field,
            )


def _check_logprobs(field: str, wanted: int | None, max_logprobs: int | None) -> None:
    if wanted is None or max_logprobs is None:
        return
    if wanted == -1:
        raise RequestError(
            f"{field}=-1 asks for all tokens, but this engine gives at most {max_logprobs}; ask "
            f"for {max_logprobs} or fewer, or start the engine with max_logprobs=-1",
            field=field,
        )
    if wanted > max_logprobs:
        raise RequestError(
            f"{field} is {wanted}, but this engine gives at most {max_logprobs}; ask for fewer, "
            "or start the engine with a larger max_logprobs",
            field=field,
        )
