"""Every engine option, once: name, default, unit, help. Flags, LLM(...) keywords and docs are
generated from here.

The config is frozen and holds what was asked; what is discovered (page count, context length that
fits) lives with its discoverer.
"""

import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import ConfigError

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
LoadFormat = Literal["auto", "safetensors", "dummy"]
SchedulingPolicy = Literal["fcfs", "priority", "fair"]


def _option(default: Any, help: str, *, metavar: str | None = None) -> Any:
    """A field of the config: its default and the line that --help prints."""
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the user asked for. None: chosen by the platform or the model, as the help says."""

    model: str | None = _option(
        None, "model folder or hub id (org/name[@revision]); the embedded demo model if not given"
    )
    tokenizer: str | None = _option(
        None, "folder or hub id of the tokenizer; the model's if not given"
    )
    revision: str | None = _option(None, "branch, tag or commit of the model on the hub")
    tokenizer_revision: str | None = _option(None, "the same for the tokenizer")
    download_dir: str | None = _option(
        None, "where hub downloads are kept; the hub's cache if not given"
    )
    dtype: Dtype = _option(
        "auto",
        "dtype of the weights, by default the checkpoint's; bfloat16 keeps its KV in float16",
    )
    load_format: LoadFormat = _option(
        "auto", "dummy makes random weights: shapes without a checkpoint"
    )
    max_model_len: int | Literal["auto"] | None = _option(
        None, "longest context in tokens; the config's, or what fits in memory", metavar="TOKENS"
    )
    seed: int = _option(
        0, "offline, the seed of requests that bring none; also that of dummy weights"
    )
    generation_config: Literal["auto", "vllm", "none"] = _option(
        "auto", "auto applies the sampling defaults of generation_config.json; vllm and none do not"
    )
    chat_template: str | None = _option(None, "a Jinja file, or the template itself")
    ignore_config_keys: tuple[str, ...] = _option(
        (), "keys of config.json to pass over, comma separated", metavar="KEYS"
    )
    tensor_parallel_size: int = _option(
        1,
        "devices that share one model, each with a part of every weight and of the KV cache: a "
        "divisor of its attention heads and MLP size",
        metavar="DEVICES",
    )
    gpu_memory_utilization: float = _option(
        0.9, "share of a GPU's memory to use in all; without effect on CPU", metavar="FRACTION"
    )
    kv_cache_memory_bytes: int | None = _option(
        None,
        "memory of each device for the KV cache; on CPU min(4 GiB, a quarter of what is "
        "available), on GPU what the weights and the workspace leave",
        metavar="BYTES",
    )
    max_num_seqs: int | None = _option(
        None, "requests that run at once; 64 on CPU, 256 on GPU", metavar="REQUESTS"
    )
    max_num_batched_tokens: int | None = _option(
        None, "tokens of one step; 1024 on CPU, 8192 on GPU", metavar="TOKENS"
    )
    scheduling_policy: SchedulingPolicy = _option(
        "fcfs",
        "who runs first: fcfs, who came first; priority, the lowest priority, then who came first; "
        "fair, equal shares of the tokens asked for to the callers that wait",
    )
    token_buckets: tuple[int, ...] | None = _option(
        None, "padded step sizes to compile, comma separated, in tokens", metavar="TOKENS,…"
    )
    decode_steps: int = _option(
        1,
        "most tokens that each running request gets in one program while nobody waits: fewer calls "
        "of the device, and new requests, stops and aborts take effect that many tokens later",
        metavar="STEPS",
    )
    page_size: int | None = _option(
        None, "tokens of one KV page; 16 on CPU, 64 on GPU", metavar="TOKENS"
    )
    enable_prefix_caching: bool = _option(True, "share the pages of equal prompt beginnings")
    max_logprobs: int = _option(20, "most logprobs a request may ask for; -1 lifts the cap")
    cpu_threads: int | None = _option(
        None,
        "threads of the CPU kernels; the physical cores the process may use, or its CPU quota",
        metavar="THREADS",
    )
    lazy_compile: bool = _option(
        False, "compile each program on first use: starts at once, for debugging only"
    )
    cache_dir: str | None = _option(
        None,
        "compiled programs and packed weights; $QUIRE_CACHE_DIR, else $XDG_CACHE_HOME/quire, else "
        "~/.cache/quire",
    )
    weight_cache_bytes: int = _option(
        20 << 30,
        "disk for weights in the packed form of the CPU kernels, so that they are packed once; the "
        "longest unused go first, and 0 keeps none",
        metavar="BYTES",
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in fields(self):
            object.__setattr__(self, f.name, checked(f.name, getattr(self, f.name), hints[f.name]))
        for name, lowest in _LOWEST.items():
            value = getattr(self, name)
            if isinstance(value, int) and value < lowest:
                raise ConfigError(f"{name} must be at least {lowest}, got {value}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}"
            )
        if self.page_size is not None and self.page_size & (self.page_size - 1):
            raise ConfigError(f"page_size must be a power of two, got {self.page_size}")


_LOWEST = {
    "max_model_len": 2,
    "tensor_parallel_size": 1,
    "kv_cache_memory_bytes": 1,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 2,
    "cpu_threads": 1,
    "page_size": 1,
    "decode_steps": 1,
    "weight_cache_bytes": 0,
    "max_logprobs": -1,
}


def checked(name: str, value: Any, hint: Any) -> Any:
    """The value in the type of its field; ConfigError names the rule and the value."""
    kinds = get_args(hint) if get_origin(hint) not in (Literal, tuple) else (hint,)
    for kind in kinds or (hint,):
        if get_origin(kind) is Literal:
            if isinstance(value, str) and value in get_args(kind):
                return value
        elif get_origin(kind) is tuple:
            item = get_args(kind)[0]
            if isinstance(value, list | tuple) and all(_is_a(v, item) for v in value):
                return tuple(value)
        elif kind is type(None):
            if value is None:
                return None
        elif kind is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
        elif kind is str:
            if isinstance(value, str | Path):
                return str(value)
        elif _is_a(value, kind):
            return value
    raise ConfigError(f"{name} must be {_described(hint)}, got {value!r}")


def _is_a(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _described(hint: Any) -> str:
    kinds = get_args(hint) if get_origin(hint) not in (Literal, tuple) else (hint,)
    words = []
    for kind in kinds or (hint,):
        if get_origin(kind) is Literal:
            words += [repr(v) for v in get_args(kind)]
        elif get_origin(kind) is tuple:
            words.append(f"a list of {get_args(kind)[0].__name__}")
        elif kind is not type(None):
            words.append({"int": "a whole number", "str": "text"}.get(kind.__name__, kind.__name__))
    return " or ".join(words)


def option_names() -> tuple[str, ...]:
    return tuple(f.name for f in fields(EngineConfig))


def nearest_option(name: str) -> str:
    """A hint for an unknown option, or nothing."""
    near = difflib.get_close_matches(name, option_names(), 1)
    return f"; did you mean {near[0]}?" if near else ""
