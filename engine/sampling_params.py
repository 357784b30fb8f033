"""What one request asks of the sampler, checked and normalised when it is made.

Knows names, types and ranges (vLLM's names and defaults); does not know a model, a tokenizer or the
engine's limits, which `token_checks.py` and `text/validate.py` add. Imports the standard library
only. A field that is not honoured is refused by name, never ignored.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, Self

from .errors import RequestError

MAX_N = 64
MAX_STOPS = 4
MAX_STOP_BYTES = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_BAD_WORDS = 128
MAX_LOGIT_BIAS = 300  # the pairs that a row holds on the device
MAX_INT = 2**63 - 1

# Names of other engines for what we have: the message says ours.
_SYNONYMS = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "num_predict": "max_tokens",
    "n_predict": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "num_return_sequences": "n",
    "repeat_penalty": "repetition_penalty",
    "top_logprobs": "logprobs",
    "random_seed": "seed",
    "do_sample": "temperature",
}

_NO_GRAMMAR = "constrained output is not available; ask for the format in the prompt"
_NO_BEAMS = "beam search is not available; use n with a temperature above 0"

# What other engines have and we do not (yet): the capability that is missing, and the way out.
_NOT_AVAILABLE = {
    "best_of": "ranking unreturned samples is not available; use n and rank by logprobs",
    "use_beam_search": _NO_BEAMS,
    "beam_width": _NO_BEAMS,
    "num_beams": _NO_BEAMS,
    "length_penalty": _NO_BEAMS,
    "early_stopping": _NO_BEAMS,
    "structured_outputs": _NO_GRAMMAR,
    "guided_decoding": _NO_GRAMMAR,
    "guided_json": _NO_GRAMMAR,
    "guided_regex": _NO_GRAMMAR,
    "guided_choice": _NO_GRAMMAR,
    "guided_grammar": _NO_GRAMMAR,
    "response_format": _NO_GRAMMAR,
    "logits_processors": (
        "per-request Python callables cannot run in a compiled step; use logit_bias, "
        "allowed_token_ids or bad_words"
    ),
    "truncate_prompt_tokens": "prompts are never cut silently; shorten the prompt before sending",
    "extra_args": "there are no plug-ins that would read it; leave it out",
    "thinking_token_budget": "limiting reasoning tokens apart is not available; use max_tokens",
    "repetition_detection": (
        "stopping on repetition is not available; use frequency_penalty or repetition_penalty"
    ),
    "output_kind": "how output is delivered is the choice of the call, not a sampling parameter",
    "skip_reading_prefix_cache": "it is automatic where it matters; leave it out",
    "logprob_token_ids": "logprobs of chosen tokens are not available; use logprobs",
    "flat_logprobs": "logprobs have one layout; leave it out",
    "skip_clone": "parameters are immutable and never cloned; leave it out",
}


@dataclass(frozen=True, kw_only=True, repr=False)
class SamplingParams:
    """Immutable. Lists become tuples and a dict a read-only mapping; nothing is clamped or reset.

    temperature 0 is greedy, exactly. top_k 0 (or -1) is off. seed None (or -1) lets the engine
    choose. max_tokens None means the rest of the context; logprobs and prompt_logprobs -1 mean all
    tokens.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    def __new__(cls, /, *positional: object, **given: object) -> Self:
        """Refuse unknown names here, before the generated __init__ would with a bare TypeError."""
        if positional:
            raise RequestError(
                f"SamplingParams takes keyword arguments only, got {positional[0]!r}; write for "
                "example SamplingParams(temperature=0.7)"
            )
        for name in given:
            if name not in cls.__dataclass_fields__:
                raise RequestError(_unknown(name, tuple(cls.__dataclass_fields__)), field=name)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = _NORMALISERS[field.name](field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if self.is_greedy and self.n > 1:
            raise RequestError(
                f"n is {self.n}, but temperature 0 is greedy and would give {self.n} equal "
                "answers; set n=1 or raise temperature",
                field="n",
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, more than max_tokens ({self.max_tokens}); "
                "lower min_tokens or raise max_tokens",
                field="min_tokens",
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self._changed().items())
        return f"SamplingParams({shown})"

    def __reduce__(self) -> tuple[Callable[[dict[str, Any]], SamplingParams], tuple[Any]]:
        """Pickle by value: a read-only mapping cannot be pickled."""
        return _rebuild, (self._changed(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> SamplingParams:
        return self

    def _changed(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {f.name: values[f.name] for f in fields(self) if values[f.name] != f.default}
        if self.logit_bias is not None:
            changed["logit_bias"] = dict(self.logit_bias)
        return changed


def _rebuild(changed: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**changed)


def _unknown(name: str, known: tuple[str, ...]) -> str:
    if name in _NOT_AVAILABLE:
        return f"{name} is not honoured: {_NOT_AVAILABLE[name]}"
    if name in _SYNONYMS:
        return f"{name} is not a sampling parameter; here it is called {_SYNONYMS[name]}"
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if nearest:
        return f"{name} is not a sampling parameter; did you mean {nearest[0]}?"
    absent = difflib.get_close_matches(name, tuple(_NOT_AVAILABLE), n=1, cutoff=0.85)
    if absent:
        return (
            f"{name} is not a sampling parameter, nor is {absent[0]}: {_NOT_AVAILABLE[absent[0]]}"
        )
    return f"{name} is not a sampling parameter; known are: {', '.join(known)}"


def _refuse(name: str, rule: str, value: object, way_out: str = "") -> RequestError:
    shown = repr(value)
    if len(shown) > 80:
        shown = f"{shown[:77]}..."
    tail = f"; {way_out}" if way_out else ""
    return RequestError(f"{name} must be {rule}, got {shown}{tail}", field=name)


def _as_int(name: str, value: object, rule: str = "an integer") -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _refuse(name, rule, value)
    return operator.index(value)  # numpy's integers become int


def _integer(low: int, high: int, rule: str, way_out: str = "") -> Callable[[str, object], int]:
    def normalise(name: str, value: object) -> int:
        number = _as_int(name, value, rule)
        if not low <= number <= high:
            raise _refuse(name, rule, number, way_out)
        return number

    return normalise


def _optional(
    normalise: Callable[[str, object], Any], absent: int | None = None
) -> Callable[[str, object], Any]:
    """None stays None; so does `absent`, the integer by which vLLM's users spell it."""

    def normalise_given(name: str, value: object) -> Any:
        if value is None:
            return None
        number = normalise(name, value)
        return None if absent is not None and number == absent else number

    return normalise_given


def _number(
    low: float, high: float, rule: str, *, above_low: bool = False, way_out: str = ""
) -> Callable[[str, object], float]:
    def normalise(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise _refuse(name, rule, value)
        try:
            number = float(value)
        except OverflowError:
            raise _refuse(name, rule, value) from None
        in_range = low < number <= high if above_low else low <= number <= high
        if not math.isfinite(number) or not in_range:
            raise _refuse(name, rule, value, way_out)
        return number

    return normalise


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _refuse(name, "True or False", value)
    return value


def _only_true(name: str, value: object) -> bool:
    if not _boolean(name, value):
        raise RequestError(
            f"{name}=False is not honoured: text is decoded as the tokenizer decodes it; leave it "
            "out",
            field=name,
        )
    return True


def _top_k(name: str, value: object) -> int:
    rule = "an integer, 1 or more, or 0 or -1 for off"
    number = _as_int(name, value, rule)
    if not -1 <= number <= MAX_INT:
        raise _refuse(name, rule, number)
    return max(number, 0)


def _list(name: str, value: object, of: str, limit: int | None) -> tuple[object, ...]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
        raise _refuse(name, f"a list of {of}", value)
    items = tuple(value)
    if limit is not None and len(items) > limit:
        raise RequestError(
            f"{name} has {len(items)} entries, at most {limit} are allowed; send fewer", field=name
        )
    return items


def _words(
    of: str, limit: int, max_bytes: int | None = None, *, allow_one: bool = False
) -> Callable[[str, object], tuple[str, ...]]:
    def normalise(name: str, value: object) -> tuple[str, ...]:
        if allow_one and isinstance(value, str):
            value = (value,)
        words = []
        for index, word in enumerate(_list(name, value, of, limit)):
            if not isinstance(word, str) or not word:
                raise _refuse(f"{name}[{index}]", "a non-empty string", word)
            num_bytes = len(word.encode("utf-8", "surrogatepass"))
            if max_bytes is not None and num_bytes > max_bytes:
                raise RequestError(
                    f"{name}[{index}] is {num_bytes} bytes long, at most {max_bytes} are allowed; "
                    "shorten it",
                    field=name,
                )
            words.append(word)
        return tuple(words)

    def named(name: str, value: object) -> tuple[str, ...]:
        try:
            return normalise(name, value)
        except RequestError as error:
            error.field = name
            raise

    return named


def _token_id(name: str, field: str, value: object) -> int:
    number = None if isinstance(value, bool) or not isinstance(value, Integral) else int(value)
    if number is None or not 0 <= number <= MAX_INT:
        error = _refuse(name, "a token id (an integer, 0 or more)", value)
        error.field = field
        raise error
    return number


def _token_ids(limit: int | None) -> Callable[[str, object], tuple[int, ...]]:
    def normalise(name: str, value: object) -> tuple[int, ...]:
        ids = _list(name, value, "token ids", limit)
        return tuple(_token_id(f"{name}[{i}]", name, token_id) for i, token_id in enumerate(ids))

    return normalise


def _allowed_token_ids(name: str, value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    ids = _token_ids(None)(name, value)
    if not ids:
        raise RequestError(
            f"{name} is empty, so no token could be chosen; list at least one id or leave it out",
            field=name,
        )
    return ids


def _logit_bias(name: str, value: object) -> Mapping[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _refuse(name, "a dict of token id to number", value)
    if len(value) > MAX_LOGIT_BIAS:
        raise RequestError(
            f"{name} has {len(value)} entries, at most {MAX_LOGIT_BIAS} are allowed; send fewer, "
            "or use allowed_token_ids to choose among many",
            field=name,
        )
    check = _number(-100.0, 100.0, "a number from -100 to 100", way_out="values are not clamped")
    bias: dict[int, float] = {}
    for key, number in value.items():
        token_id = _token_id(f"a key of {name}", name, key)
        try:
            bias[token_id] = check(f"{name}[{token_id}]", number)
        except RequestError as error:
            error.field = name
            raise
    return MappingProxyType(bias)


_PENALTY = _number(-2.0, 2.0, "a number from -2 to 2")
_LOGPROBS = _optional(_integer(-1, MAX_INT, "an integer, 0 or more, or -1 for all tokens"))

_NORMALISERS: dict[str, Callable[[str, object], Any]] = {
    "n": _integer(1, MAX_N, f"an integer from 1 to {MAX_N}", "send several requests for more"),
    "temperature": _number(0.0, 2.0, "a number from 0 (greedy) to 2"),
    "top_p": _number(0.0, 1.0, "a number above 0, up to 1 (off)", above_low=True),
    "top_k": _top_k,
    "min_p": _number(0.0, 1.0, "a number from 0 (off) to 1"),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": _number(0.0, math.inf, "a finite number above 0", above_low=True),
    "seed": _optional(_integer(-(2**63), MAX_INT, "an integer of 64 bits, or None"), absent=-1),
    "stop": _words("strings, or one string", MAX_STOPS, MAX_STOP_BYTES, allow_one=True),
    "stop_token_ids": _token_ids(MAX_STOP_TOKEN_IDS),
    "include_stop_str_in_output": _boolean,
    "ignore_eos": _boolean,
    "min_tokens": _integer(0, MAX_INT, "an integer, 0 or more"),
    "max_tokens": _optional(
        _integer(1, MAX_INT, "an integer, 1 or more, or None", "None means the rest of the context")
    ),
    "logprobs": _LOGPROBS,
    "prompt_logprobs": _LOGPROBS,
    "logit_bias": _logit_bias,
    "allowed_token_ids": _allowed_token_ids,
    "bad_words": _words("strings", MAX_BAD_WORDS),
    "detokenize": _boolean,
    "skip_special_tokens": _boolean,
    "spaces_between_special_tokens": _only_true,
}
