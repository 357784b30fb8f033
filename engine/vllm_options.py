"""What happens with vLLM's keyword arguments and flags that are not options of ours.

Renamed ones are mapped, ones that cannot change an answer are accepted with one warning, and ones
that could are refused with the way out. The table is the whole rule.
"""

import warnings
from typing import Any

from .config import nearest_option, option_names
from .errors import ConfigError

RENAMED = {"block_size": "page_size", "enforce_eager": "lazy_compile"}

# name -> why nothing is lost
WITHOUT_EFFECT = {
    "async_scheduling": "the step loop is always one step ahead",
    "compilation_config": "shapes are planned; see token_buckets",
    "cudagraph_capture_sizes": "shapes are planned; see token_buckets",
    "disable_custom_all_reduce": "XLA chooses the collectives",
    "disable_log_requests": "requests are not logged",
    "disable_log_stats": "no statistics are logged",
    "enable_chunked_prefill": "prompts are always computed in chunks",
    "max_seq_len_to_capture": "shapes are planned; see token_buckets",
    "num_scheduler_steps": "the step loop is always one step ahead",
    "trust_remote_code": "remote code is never executed; architectures are built in",
    "tokenizer_mode": "there is one tokenizer implementation",
    "use_tqdm_on_load": "progress is shown on a terminal",
    "swap_space": "preempted requests are recomputed",
}

# name -> (the values at which it asks for nothing, what to do instead)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "cpu_offload_gb": ((0, None), "weights stay on the device"),
    "data_parallel_size": ((1, None), "start one engine per replica"),
    "distributed_executor_backend": ((None,), "there is one process per engine"),
    "enable_expert_parallel": ((False, None), "expert parallelism is not implemented yet"),
    "enable_lora": ((False, None), "LoRA adapters are not implemented yet"),
    "guided_decoding_backend": ((None,), "structured output is not implemented yet"),
    "hf_overrides": ((None, {}), "edit config.json"),
    "kv_cache_dtype": (("auto", None), "quantized KV caches are not implemented yet"),
    "limit_mm_per_prompt": ((None, {}), "image and audio input is not implemented"),
    "override_generation_config": ((None, {}), "pass SamplingParams"),
    "pipeline_parallel_size": ((1, None), "pipeline parallelism is not implemented yet"),
    "quantization": ((None,), "use an unquantized checkpoint; others are not implemented yet"),
    "rope_scaling": ((None, {}), "edit rope_scaling in config.json"),
    "rope_theta": ((None,), "edit rope_theta in config.json"),
    "runner": ((None, "auto", "generate"), "pooling models are not implemented yet"),
    "skip_tokenizer_init": ((False, None), "a tokenizer is needed"),
    "speculative_config": ((None,), "speculative decoding is not implemented yet"),
    "task": ((None, "auto", "generate"), "pooling models are not implemented yet"),
}


def translate(keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords of EngineConfig from what the caller wrote. Warns once for all that are without
    effect.
    """
    known = set(option_names())
    kept: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    idle = []
    for name, value in keywords.items():
        target = RENAMED.get(name, name)
        if target in known:
            if target in kept:
                raise ConfigError(f"{spelled[target]} and {name} are the same option; give one")
            kept[target], spelled[target] = value, name
        elif name in WITHOUT_EFFECT:
            idle.append(f"{name} ({WITHOUT_EFFECT[name]})")
        elif name in REFUSED:
            harmless, way_out = REFUSED[name]
            if value not in harmless:
                raise ConfigError(f"{name} = {value!r} is not available: {way_out}")
        else:
            raise ConfigError(f"unknown option {name!r}{nearest_option(name)}")
    if idle:
        warnings.warn(f"without effect here: {', '.join(idle)}", UserWarning, stacklevel=3)
    return kept
