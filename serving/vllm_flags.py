"""What `quire serve` and `quire engine` do with the flags of vLLM's guides that are not ours.

Renamed ones are mapped, ones that change nothing are passed over, ones that would are refused with
the way out; each is said once. The tables are the whole rule; those of keywords that LLM(...) takes
too are engine/vllm_options.py's.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine.errors import ConfigError
from ..engine.vllm_options import REFUSED, RENAMED, WITHOUT_EFFECT
from .flags import FALSE, TRUE, Collect, is_secret

_SHORT = {
    "-tp": "--tensor-parallel-size",
    "-dp": "--data-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-q": "--quantization",
}

# Theirs -> ours; those of RENAMED besides.
_ALIASES = {
    "shutdown_timeout": "drain_timeout",
    "uvicorn_log_level": "log_level",
}

# Flags without a value, so that what follows one is not taken for it.
_SWITCHES = frozenset(
    {
        "async_scheduling",
        "disable_custom_all_reduce",
        "disable_log_requests",
        "disable_log_stats",
        "disable_uvicorn_access_log",
        "enable_prompt_tokens_details",
        "enable_auto_tool_choice",
        "enable_chunked_prefill",
        "enable_expert_parallel",
        "enable_lora",
        "enforce_eager",
        "ray_workers_use_nsight",
        "skip_tokenizer_init",
        "trust_remote_code",
        "use_tqdm_on_load",
    }
)

_PLANNED = "shapes are planned; see --token-buckets"
_AHEAD = "the step loop is already one step ahead"
_ONE_BACKEND = "there is one backend, and it is not there yet"
_NO_TOOLS = "tool calls are not parsed yet"

# Of servers only. name -> why, and what to do
_REFUSED = {
    "allow_credentials": "pages of other origins send none",
    "allowed_headers": "pages of allowed origins may send any",
    "allowed_methods": "pages of allowed origins may use GET and POST",
    "num_gpu_blocks_override": "see --kv-cache-memory-bytes",
    "api_server_middleware": "put a reverse proxy in front of the server",
    "middleware": "put a reverse proxy in front of the server",
    "compilation_config": _PLANNED,
    "compilation_level": _PLANNED,
    "cudagraph_capture_sizes": _PLANNED,
    "max_seq_len_to_capture": _PLANNED,
    "O": _PLANNED,
    "multi_step_stream_outputs": _AHEAD,
    "disable_custom_all_reduce": "XLA chooses the collectives",
    "ray_workers_use_nsight": "many hosts are not supported yet",
    "enable_auto_tool_choice": _NO_TOOLS,
    "tool_call_parser": _NO_TOOLS,
    "reasoning_parser": "reasoning is not parsed yet; it is part of the text",
    "structured_outputs_config": _ONE_BACKEND,
    "otlp_traces_endpoint": "tracing is not there yet; see --metrics-port",
    "lora_modules": "LoRA adapters are not implemented yet",
    "max_loras": "LoRA adapters are not implemented yet",
    "max_lora_rank": "LoRA adapters are not implemented yet",
    "max_cpu_loras": "LoRA adapters are not implemented yet",
    "lora_extra_vocab_size": "adapters with tokens of their own are not read",
    "long_lora_scaling_factors": "adapters with factors of their own are not read",
    "speculative_model": "speculative decoding is not implemented yet",
    "num_speculative_tokens": "speculative decoding is not implemented yet",
    "ngram_prompt_lookup_max": "speculative decoding is not implemented yet",
    "ngram_prompt_lookup_min": "speculative decoding is not implemented yet",
    "speculative_disable_by_batch_size": "speculative decoding is not implemented yet",
    "speculative_draft_tensor_parallel_size": "speculative decoding is not implemented yet",
    "kv_offloading_size": "pages are not moved to the host; preempted requests are recomputed",
}

# Of servers only. name -> why nothing is lost
_WITHOUT_EFFECT = WITHOUT_EFFECT | {
    "disable_uvicorn_access_log": "accesses are not logged",
    "enable_prompt_tokens_details": "they are always told",
    "chat_template_content_format": "templates get texts",
    "attention_backend": "the implementation is chosen by the platform; see `quire env`",
}
# Of servers only. name -> (the values at which it asks for nothing, what to do instead)
_REFUSED_UNLESS: dict[str, tuple[tuple[Any, ...], str]] = {
    "stream_interval": ((1,), "every token is sent when it is there"),
    "config_format": (("auto", "hf"), "config.json is read, whose style is seen"),
    "num_scheduler_steps": ((1,), _AHEAD),
    "swap_space": ((0,), "pages are not moved to the host; preempted requests are recomputed"),
}
# Variables of theirs -> why they are not read
VARIABLES_WITHOUT_EFFECT = {
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "a context over the model's is refused",
    "VLLM_CACHE_ROOT": "compiled programs are kept in --cache-dir",
}

_CONDITIONAL = REFUSED | _REFUSED_UNLESS
# A flag of ours and a value of theirs -> why it is gone
_GONE_VALUES = {
    ("--load-format", value): "pickle files are not read; convert the checkpoint to safetensors"
    for value in ("pt", "npcache")
}


@dataclass
class Translated:
    """Arguments in our own flags, and what is to be said about those that were not."""

    arguments: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def translate_flags(arguments: Sequence[str], known: Mapping[str, argparse.Action]) -> Translated:
    """known: our own flags, which pass. Raises ConfigError; unknown flags pass too, to be answered
    with the nearest known one.
    """
    translated = Translated()
    left = list(arguments)
    has_model = False
    while left:
        argument = left.pop(0)
        if argument.startswith("-O"):
            raise ConfigError(f"{argument} is not available: {_PLANNED}")
        flag, equals, value = argument.partition("=")
        flag = _SHORT.get(flag, flag)
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("-"):
            has_model = True
        if why := _GONE_VALUES.get((flag, value if equals else next(iter(left), ""))):
            raise ConfigError(f"{flag} {value or left[0]} is not available: {why}")
        has_model = has_model or flag == "--model"
        if flag in known and known[flag].nargs == 0 and value.lower() in TRUE + FALSE:
            is_on = value.lower() in TRUE
            translated.arguments.append(flag if is_on else f"--no-{flag[2:]}")
            continue
        if flag in known and not equals:
            translated.arguments += _with_values(flag, known[flag], left, has_model)
            continue
        if not flag.startswith("--") or flag in known:
            translated.arguments.append(flag + equals + value)
            continue
        mapped = our_flag(flag)
        if mapped != flag:
            left.insert(0, mapped + equals + value)
            translated.notes.append(f"{flag} is {mapped} here")
            continue
        has_value = bool(equals)
        if not has_value and name not in _SWITCHES and left and not left[0].startswith("--"):
            value, has_value = left[0], True
        if _answer(flag, name, value if has_value else None, translated.notes):
            if has_value and not equals:
                left.pop(0)
        else:
            translated.arguments.append(argument)
    return translated


def our_flag(flag: str) -> str:
    """The name that a flag has here."""
    ours = (RENAMED | _ALIASES).get(flag.removeprefix("--").replace("-", "_"))
    return flag if ours is None else f"--{ours.replace('_', '-')}"


def is_switch(flag: str) -> bool:
    """Whether it is one of vLLM's without a value."""
    return flag.removeprefix("--").replace("-", "_") in _SWITCHES


def flags_of_vllm() -> dict[str, str]:
    """Every flag that is not ours -> what becomes of it."""

    def spelt(name: str) -> str:
        return f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"

    return {
        **{spelt(theirs): f"is `{spelt(ours)}`" for theirs, ours in (RENAMED | _ALIASES).items()},
        **{short: f"is `{long}`" for short, long in _SHORT.items()},
        **{spelt(name): f"no effect: {why}" for name, why in _WITHOUT_EFFECT.items()},
        **{spelt(name): f"refused: {why}" for name, why in _REFUSED.items()},
        **{
            spelt(name): f"refused unless {' or '.join(map(_spelt, harmless))}: {way_out}"
            for name, (harmless, way_out) in _CONDITIONAL.items()
        },
    }


def _spelt(value: Any) -> str:
    if value is None:
        return "left out"
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def _with_values(flag: str, action: argparse.Action, left: list[str], has_model: bool) -> list[str]:
    """Takes the flag's values off what is left. A list may be several words, as vLLM's are."""
    if action.nargs == 0:
        return [flag]
    words = [left.pop(0)] if left else []
    if not isinstance(action, Collect) or not words:
        return [flag, *words]
    while left and not left[0].startswith("-"):
        words.append(left.pop(0))
    if len(words) > 1 and not has_model:
        shown = "" if is_secret(action) else f" {' '.join(words)}"
        raise ConfigError(
            f"{flag}{shown}: one of these {len(words)} may be the model; write it before the flags "
            "or with --model, or repeat the flag for each value"
        )
    return [part for word in words for part in (flag, word)]


def _answer(flag: str, name: str, value: str | None, notes: list[str]) -> bool:
    """Whether the flag is one of theirs, and nothing is to be done. Raises ConfigError."""
    if name == "no_enable_chunked_prefill" or (name, value) == ("enable_chunked_prefill", "false"):
        raise ConfigError(f"{flag}: there are no phases to switch; leave it out")
    if name in _REFUSED:
        raise ConfigError(f"{flag} is not available: {_REFUSED[name]}")
    if name in _CONDITIONAL:
        harmless, way_out = _CONDITIONAL[name]
        if _read(value) not in harmless:
            raise ConfigError(f"{flag} is not available: {way_out}")
        return True
    if name in _WITHOUT_EFFECT:
        notes.append(f"{flag} has no effect: {_WITHOUT_EFFECT[name]}")
        return True
    return False


def _read(value: str | None) -> Any:
    """A flag's text as the keyword's value; a switch is True."""
    if value is None:
        return True
    try:
        return json.loads(value)
    except ValueError:
        return value
