import dataclasses
from pathlib import Path
from typing import Any

import pytest
from quire.engine.config import EngineConfig, nearest_option, option_names
from quire.engine.errors import ConfigError


def test_defaults_are_sound_and_every_option_has_help():
    config = EngineConfig()
    assert config.model is None
    assert config.seed == 0
    for field in dataclasses.fields(config):
        assert field.metadata["help"], field.name
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize(
    ("option", "given", "held"),
    [
        ("model", Path("/models/x"), "/models/x"),
        ("max_model_len", "auto", "auto"),
        ("max_model_len", 2, 2),
        ("gpu_memory_utilization", 1, 1.0),
        ("token_buckets", [2, 8], (2, 8)),
        ("ignore_config_keys", ["a"], ("a",)),
        ("seed", -5, -5),
        ("seed", 2**64, 2**64),
        ("max_logprobs", -1, -1),
        ("page_size", 1, 1),
        ("kv_cache_memory_bytes", None, None),
    ],
)
def test_a_value_is_held_in_the_type_of_its_field(option: str, given: Any, held: Any):
    value = getattr(EngineConfig(**{option: given}), option)
    assert value == held
    assert type(value) is type(held)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("model", 3, "model must be text, got 3"),
        ("dtype", "fp8", "dtype must be 'auto' or 'bfloat16' or 'float16' or 'float32', got 'fp8'"),
        ("dtype", None, "dtype must be 'auto' or"),
        ("scheduling_policy", "lifo", "must be 'fcfs' or 'priority' or 'fair', got 'lifo'"),
        ("load_format", "pt", "load_format must be 'auto' or 'safetensors' or 'dummy', got 'pt'"),
        ("max_model_len", "long", "max_model_len must be a whole number or 'auto', got 'long'"),
        ("max_model_len", 1, "max_model_len must be at least 2, got 1"),
        ("max_model_len", 9.0, "max_model_len must be a whole number or 'auto', got 9.0"),
        ("seed", True, "seed must be a whole number, got True"),
        ("seed", None, "seed must be a whole number, got None"),
        ("gpu_memory_utilization", 0, "gpu_memory_utilization must be in (0, 1], got 0.0"),
        ("gpu_memory_utilization", 1.01, "gpu_memory_utilization must be in (0, 1], got 1.01"),
        ("gpu_memory_utilization", float("nan"), "must be in (0, 1], got nan"),
        ("gpu_memory_utilization", "0.9", "gpu_memory_utilization must be float, got '0.9'"),
        ("enable_prefix_caching", 1, "enable_prefix_caching must be bool, got 1"),
        ("token_buckets", "2,4", "token_buckets must be a list of int, got '2,4'"),
        ("token_buckets", [2.0], "token_buckets must be a list of int, got [2.0]"),
        ("ignore_config_keys", "key", "ignore_config_keys must be a list of str, got 'key'"),
        ("page_size", 48, "page_size must be a power of two, got 48"),
        ("page_size", 0, "page_size must be at least 1, got 0"),
        ("max_num_seqs", 0, "max_num_seqs must be at least 1, got 0"),
        ("max_num_batched_tokens", 1, "max_num_batched_tokens must be at least 2, got 1"),
        ("tensor_parallel_size", 0, "tensor_parallel_size must be at least 1, got 0"),
        ("kv_cache_memory_bytes", 0, "kv_cache_memory_bytes must be at least 1, got 0"),
        ("max_logprobs", -2, "max_logprobs must be at least -1, got -2"),
    ],
)
def test_a_wrong_value_is_refused_with_the_rule(option: str, value: Any, message: str):
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{option: value})
    assert message in str(caught.value)


def test_nearest_option():
    assert nearest_option("max_model_length") == "; did you mean max_model_len?"
    assert nearest_option("zzzz") == ""
    assert len(option_names()) == len(set(option_names())) > 20
