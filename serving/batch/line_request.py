"""What one line of the input asks for: quire's own lines, and what they share with OpenAI's.

Knows names and shapes; values are checked by SamplingParams, the chat template and the engine. A
field that is not honoured is refused by name.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...engine.errors import RequestError
from ...engine.sampling_params import SamplingParams
from ...engine.text.chat_template import RESERVED_VARIABLES

LineId = str | int

SAMPLING_FIELDS = tuple(f.name for f in dataclasses.fields(SamplingParams))
_PROMPTS = ("prompt", "prompt_token_ids", "messages")
_CHAT_ONLY = ("tools", "chat_template_kwargs")
_FIELDS = ("id", *_PROMPTS, *_CHAT_ONLY)
_PROMPT_RULES: dict[str, tuple[type, str]] = {
    "prompt": (str, "a string (token ids go into prompt_token_ids)"),
    "prompt_token_ids": (list, "a list of token ids"),
}


@dataclass(frozen=True)
class LineRequest:
    """prompt: as LLM.check takes it; None for a conversation. defaults: sampling values of this
    kind of line, under the command's flags. spelled: our name of a sampling field -> the line's
    name, where they differ. echo: fields that the result repeats.
    """

    prompt: Any = None
    messages: Any = None
    tools: Any = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    spelled: Mapping[str, str] = field(default_factory=dict)
    echo: Mapping[str, Any] = field(default_factory=dict)


def line_id(value: object, name: str) -> LineId | None:
    """The id as the line gives it, None without one. Raises RequestError."""
    if value is None or (isinstance(value, str | int) and not isinstance(value, bool)):
        return value
    raise RequestError(
        f"{name} must be a string or a whole number, got {type(value).__name__}; or leave it out",
        field=name,
    )


def read_native(fields: Mapping[str, Any]) -> LineRequest:
    """null is "not given", but for sampling fields it is what SamplingParams says. Raises
    RequestError with the field.
    """
    refuse_unknown(fields, (*_FIELDS, *SAMPLING_FIELDS), own=_FIELDS)
    given = [name for name in _PROMPTS if fields.get(name) is not None]
    if len(given) != 1:
        raise RequestError(
            f"a line needs one of {', '.join(_PROMPTS)}, this one has "
            f"{' and '.join(given) or 'none'}",
            field=given[1] if given else "prompt",
        )
    sampling = {n: v for n, v in fields.items() if n in SAMPLING_FIELDS}
    if "logit_bias" in sampling:
        sampling["logit_bias"] = bias_by_token(sampling["logit_bias"])
    if given == ["messages"]:
        return LineRequest(
            messages=fields["messages"],
            tools=fields.get("tools"),
            chat_template_kwargs=template_variables(fields.get("chat_template_kwargs")),
            sampling=sampling,
        )
    for name in _CHAT_ONLY:
        if fields.get(name) is not None:
            raise RequestError(
                f"{name} goes into a chat template, so it needs messages, not {given[0]}; leave it "
                "out",
                field=name,
            )
    prompt = fields[given[0]]
    kind, rule = _PROMPT_RULES[given[0]]
    if not isinstance(prompt, kind):
        raise RequestError(
            f"{given[0]} must be {rule}, got {type(prompt).__name__}", field=given[0]
        )
    return LineRequest(prompt={given[0]: prompt}, sampling=sampling)


def refuse_unknown(fields: Iterable[str], known: Iterable[str], own: Iterable[str]) -> None:
    """own: the known names that are not SamplingParams', which has messages for the others."""
    known, own = tuple(known), tuple(own)
    for name in fields:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, 1, cutoff=0.75)
        if near and near[0] in own:
            raise RequestError(
                f"{name} is not a field of a line; did you mean {near[0]}?", field=name
            )
        unknown: dict[str, Any] = {name: None}
        SamplingParams(**unknown)  # knows what other engines have, and says the way out


def template_variables(value: object) -> Mapping[str, Any]:
    """chat_template_kwargs, checked."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RequestError(
            f"chat_template_kwargs must be an object, got {type(value).__name__}",
            field="chat_template_kwargs",
        )
    for name in value:
        if name in RESERVED_VARIABLES:
            raise RequestError(
                f"chat_template_kwargs may not set {name}, which follows from the line; leave it "
                "out",
                field="chat_template_kwargs",
            )
    return value


def bias_by_token(value: object) -> object:
    """logit_bias with token ids for JSON's string keys; what is no object stays, to be refused."""
    if not isinstance(value, Mapping):
        return value
    bias = {}
    for key, number in value.items():
        if not (key.isascii() and key.isdigit() and str(int(key[:20])) == key):
            raise RequestError(
                f"logit_bias has the key {key!r:.80}; keys are token ids, written like "
                '{"1234": -100}',
                field="logit_bias",
            )
        bias[int(key)] = number
    return bias
