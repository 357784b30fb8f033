"""The text-level check of a request, the same one for LLM and for the gateway.

Knows prompts as users write them and what needs a tokenizer; ids against a model's width and
lengths against its context are `engine/token_checks.py`'s.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast

from ..errors import ContextExceeded, RequestError
from ..sampling_params import SamplingParams
from .tokenizer import Tokenizer

MAX_BAD_WORD_TOKENS = 1024
# A text this many times longer than the context's longest possible one is not even encoded: 30 MiB
# of text took 4 GiB of memory before they were refused.
_HOPELESS = 4
_PROMPT_KEYS = ("prompt", "prompt_token_ids")


@dataclass(frozen=True)
class TextRequest:
    """prompt: the text as it came, None where only ids came. bad_word_ids: sequences to avoid."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    bad_word_ids: tuple[tuple[int, ...], ...]


def check_text_request(
    prompt: object,
    params: SamplingParams,
    tokenizer: Tokenizer,
    *,
    max_model_len: int,
    add_special_tokens: bool = True,
    keep_last: int | None = None,
) -> TextRequest:
    """prompt: a text, a list of token ids, or a dict with "prompt" or "prompt_token_ids" (ids win).

    max_model_len: tokens; what is far too long for it is refused by its characters.
    add_special_tokens=False for a rendered chat template, which has written them. keep_last: how
    many tokens of a longer prompt stay, the last ones. Raises RequestError.
    """
    if params.stop and not params.detokenize:
        raise RequestError(
            "stop strings are found in text, but detokenize is False; set detokenize=True or use "
            "stop_token_ids",
            field="stop",
        )
    text, token_ids = _read_prompt(prompt)
    if token_ids is None:
        _check_length(text or "", tokenizer, max_model_len)
        token_ids = _encode(text or "", tokenizer, add_special_tokens)
    return TextRequest(
        prompt=text,
        prompt_token_ids=token_ids if keep_last is None else token_ids[-keep_last:],
        params=params,
        bad_word_ids=_encode_bad_words(params.bad_words, tokenizer),
    )


def _read_prompt(prompt: object) -> tuple[str | None, tuple[int, ...] | None]:
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, Mapping):
        return _read_prompt_dict(prompt)
    return None, _read_ids(prompt, "prompt")


def _read_prompt_dict(prompt: Mapping[object, object]) -> tuple[str | None, tuple[int, ...] | None]:
    for key in prompt:
        if key not in _PROMPT_KEYS:
            raise RequestError(
                f"{key} in a prompt is not honoured; a prompt dict has {' or '.join(_PROMPT_KEYS)}",
                field=str(key),
            )
    text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is not None and not isinstance(text, str):
        raise RequestError(
            f"prompt in a prompt dict must be a string, got {type(text).__name__}; token ids go "
            "into prompt_token_ids",
            field="prompt",
        )
    if token_ids is not None:
        return text, _read_ids(token_ids, "prompt_token_ids")
    if text is None:
        raise RequestError(
            f"a prompt dict needs {' or '.join(_PROMPT_KEYS)}, it has neither", field="prompt"
        )
    return text, None


def _read_ids(value: object, field: str) -> tuple[int, ...]:
    """Numpy's arrays and integers become plain ints: only those cross to the engine."""
    if isinstance(value, (bytes, Mapping)) or not (
        isinstance(value, Sequence) or hasattr(value, "__array__")
    ):
        raise RequestError(
            f"{field} must be a string or a list of token ids, got {type(value).__name__}",
            field=field,
        )
    ids: tuple[Any, ...] = tuple(cast(Sequence[Any], value))
    if not ids:
        raise RequestError(
            f"{field} is empty, so there is nothing to continue; send at least one token",
            field=field,
        )
    if set(map(type, ids)) == {int}:
        return ids
    for position, token_id in enumerate(ids):
        if isinstance(token_id, str):
            raise RequestError(
                f"{field} is a list of strings, but this is one prompt; send each text as its own "
                "prompt",
                field=field,
            )
        if isinstance(token_id, bool) or not isinstance(token_id, Integral):
            raise RequestError(
                f"{field}[{position}] must be a token id, got {token_id!r:.80}", field=field
            )
    return tuple(map(operator.index, ids))


def _check_length(text: str, tokenizer: Tokenizer, max_model_len: int) -> None:
    most = _HOPELESS * max_model_len * tokenizer.most_characters
    if len(text) > most:
        raise ContextExceeded(
            f"the prompt has {len(text)} characters, which cannot be {max_model_len} tokens or "
            "fewer (max_model_len); shorten it",
            field="prompt",
        )


def _encode(text: str, tokenizer: Tokenizer, add_special_tokens: bool) -> tuple[int, ...]:
    _check_unicode("prompt", text)
    token_ids = tuple(tokenizer.encode(text, add_special_tokens))
    if not token_ids:
        raise RequestError(
            "the prompt is empty, and this tokenizer adds no beginning-of-sequence token, so "
            "there is nothing to continue; send some text",
            field="prompt",
        )
    return token_ids


def _encode_bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word at the start of a text and after a space: different tokens, both to be avoided."""
    sequences: dict[tuple[int, ...], None] = {}
    for index, word in enumerate(words):
        _check_unicode(f"bad_words[{index}]", word)
        for variant in (word, f" {word.lstrip()}"):
            token_ids = tuple(tokenizer.encode(variant, add_special_tokens=False))
            if not token_ids:
                raise RequestError(
                    f"bad_words[{index}] is {word!r}, which this tokenizer turns into no tokens; "
                    "leave it out",
                    field="bad_words",
                )
            sequences[token_ids] = None
    num_tokens = sum(map(len, sequences))
    if num_tokens > MAX_BAD_WORD_TOKENS:
        raise RequestError(
            f"bad_words make {num_tokens} tokens with and without a leading space, at most "
            f"{MAX_BAD_WORD_TOKENS} are allowed; send fewer or shorter words",
            field="bad_words",
        )
    return tuple(sequences)


def _check_unicode(field: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{field} has half of a surrogate pair at character {error.start}, which is not text; "
            'decode it properly, or with errors="replace"',
            field=field.partition("[")[0],
        ) from None
