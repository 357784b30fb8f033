"""What becomes of each field that OpenAI's clients, and vLLM's, may send: the one table.

Honoured fields are those of the models in requests.py. Here is the rest: accepted
because it changes nothing, refused because it would, and everything else is unknown.
"""

import difflib
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import HttpError

logger = logging.getLogger(__name__)


# What asks for nothing, whatever the field.
NOTHING: tuple[Any, ...] = (None, False, "", [], {})

# name -> the values with which nothing is lost; None is any.
ACCEPTED: dict[str, tuple[Any, ...] | None] = {
    "user": None,
    "metadata": None,
    "store": (False,),
    "service_tier": None,
    "safety_identifier": None,
    "prompt_cache_key": None,
    "verbosity": None,
    "parallel_tool_calls": None,
    "tool_choice": ("none",),
    "spaces_between_special_tokens": (True,),
    "truncation_side": ("left",),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}

_SCHEMAS = "constrained output is not available yet; ask for the format in the prompt"
_TOOLS = "tool calls are not parsed yet; describe the tools in a message and read the answer's text"
_TEMPLATE = "the server's own chat template is used; start it with --chat-template for another"
_BEAMS = "beam search is not available; use n with a temperature above 0"

# name -> what to do instead.
REFUSED: dict[str, str] = {
    "tools": _TOOLS,
    "tool_choice": _TOOLS,
    "functions": _TOOLS,
    "function_call": _TOOLS,
    "response_format": _SCHEMAS,
    "structured_outputs": _SCHEMAS,
    "guided_json": _SCHEMAS,
    "guided_regex": _SCHEMAS,
    "guided_choice": _SCHEMAS,
    "guided_grammar": _SCHEMAS,
    "guided_decoding_backend": _SCHEMAS,
    "guided_whitespace_pattern": _SCHEMAS,
    "modalities": "only text is understood and given",
    "audio": "only text is understood and given",
    "prediction": "predicted outputs are not available; leave it out",
    "web_search_options": "nothing is fetched from the web; put the text into a message",
    "reasoning_effort": "it is not passed to the model; use chat_template_kwargs if its template "
    "has such a variable",
    "chat_template": _TEMPLATE,
    "logits_processors": "callables cannot run in a compiled step; use logit_bias",
    "kv_transfer_params": "disaggregated serving is not available; leave it out",
    "use_beam_search": _BEAMS,
    "length_penalty": _BEAMS,
    "best_of": "ranking unreturned answers is not available; use n and logprobs",
    "documents": "retrieval templates are not available; put the texts into a message",
    "mm_processor_kwargs": "only text is understood; leave it out",
    "suffix": "filling in the middle is not available; leave it out",
    "store": "nothing is kept on the server; leave it out",
    "spaces_between_special_tokens": "only true is available",
    "truncation_side": "a prompt that is cut keeps its end; leave it out",
    "thinking_token_budget": "limiting reasoning tokens apart is not available; use max_tokens",
    "include_reasoning": "reasoning is not parsed yet; it is part of the text",
}


def check_rest(rest: Mapping[str, Any], honoured: Iterable[str], *, refuses_unknown: bool) -> None:
    """rest: the fields that the model does not have. Raises HttpError."""
    for name, value in rest.items():
        if name in ACCEPTED and _is_one_of(value, ACCEPTED[name]):
            continue
        if name in REFUSED:
            if _is_one_of(value, NOTHING):
                continue
            raise HttpError.bad_request(
                f"{name} is not honoured: {REFUSED[name]}",
                param=name,
                code="unsupported_parameter",
            )
        if name in ACCEPTED:
            raise HttpError.bad_request(
                f"{name}={value!r:.80} is not honoured; leave it out",
                param=name,
                code="unsupported_parameter",
            )
        known = (*honoured, *ACCEPTED, *REFUSED)
        near = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        message = f"Unrecognized request argument: {name[:80]}{hint}"
        if refuses_unknown:
            raise HttpError.bad_request(message, param=name[:80], code="unknown_parameter")
        logger.warning("%s; it is passed over", message)


def _is_one_of(value: Any, values: tuple[Any, ...] | None) -> bool:
    """1 is not true, as it is to Python."""
    return values is None or any(type(value) is type(one) and value == one for one in values)
