"""Every key of a config.json is used, known not to matter, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from quire.layers.models.config_reader import HARMLESS_AT, IRRELEVANT, ConfigError, ConfigReader
from quire.layers.models.registry import ModelInfo, model_types, read_model

LAYERS = 4
BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CLASSES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


@pytest.fixture
def read(tmp_path: Path):
    def read(model_type: str = "llama", ignored: tuple[str, ...] = (), /, **keys: Any) -> ModelInfo:
        """The model of BASE with these keys; a key given as `...` is left out."""
        keys = BASE | {"model_type": model_type} | keys
        kept = {k: v for k, v in keys.items() if v is not ...}
        (tmp_path / "config.json").write_text(json.dumps(kept), encoding="utf-8")
        return read_model(tmp_path, ignored)

    return read


def refusal(read: Any, *arguments: Any, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*arguments, **keys)
    return str(caught.value)


@pytest.mark.parametrize("model_type", model_types())
def test_every_key_of_transformers_is_accounted_for(model_type: str, read: Any):
    config = CLASSES[model_type](**BASE)
    keys = config.to_dict()
    assert keys.keys() >= {"rope_parameters", "rms_norm_eps", "dtype"}
    spec = read(model_type, **keys).model.spec
    for name, value in (("num_kv_heads", 2), ("vocab_size", 64), ("mlp_size", 48)):
        assert getattr(spec, name) == value
    assert spec.head_dim == getattr(config, "head_dim", None) or 8
    assert spec.epsilon == config.rms_norm_eps
    assert spec.rope.theta == config.rope_parameters["rope_theta"]
    assert spec.tie_embeddings == config.tie_word_embeddings


@pytest.mark.parametrize("model_type", model_types())
def test_an_absent_key_means_what_transformers_assumes(model_type: str, read: Any):
    """Absent is not null: an absent num_key_value_heads is 8 for Mistral and 32 for Qwen."""
    absent = ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "hidden_act")
    sizes = {"num_attention_heads": 64, "hidden_size": 64}
    config = CLASSES[model_type](**{k: v for k, v in BASE.items() if k not in absent} | sizes)
    spec = read(model_type, **sizes, **dict.fromkeys(absent, ...)).model.spec
    assert spec.num_kv_heads == config.num_key_value_heads
    assert spec.epsilon == config.rms_norm_eps
    assert spec.tie_embeddings == config.tie_word_embeddings
    assert spec.head_dim == (128 if model_type == "qwen3" else 1)
    assert read(model_type, **sizes, num_key_value_heads=None).model.spec.num_kv_heads == 64


def test_both_config_styles_give_the_same_model(read: Any):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    old = read(
        rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling}, torch_dtype="float16"
    )
    older = read(rope_theta=5e5, rope_scaling={"type": "llama3", **scaling}, torch_dtype="float16")
    new = read(
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling}, dtype="float16"
    )
    assert old.model.spec == older.model.spec == new.model.spec
    assert old.dtype == new.dtype == "float16"
    assert new.model.spec.rope.theta == 5e5
    assert read().dtype is None


def test_biases_and_norms_of_the_families(read: Any):
    for model_type, keys, switches in (
        ("llama", {}, (False, False, False, False)),
        ("llama", {"attention_bias": True, "mlp_bias": True}, (True, True, True, False)),
        ("mistral", {}, (False, False, False, False)),
        ("qwen2", {}, (True, False, False, False)),
        ("qwen3", {}, (False, False, False, True)),
        ("qwen3", {"attention_bias": True}, (True, True, False, True)),
    ):
        s = read(model_type, **keys).model.spec
        assert (s.qkv_bias, s.out_bias, s.mlp_bias, s.head_norm) == switches


def test_unknown_keys_are_refused_with_their_values_and_the_flag(read: Any):
    message = refusal(read, atention_bias=True, new_norm="odd")
    assert "config.json has keys that quire does not know" in message
    assert 'atention_bias = true, new_norm = "odd"' in message
    assert "is atention_bias meant to be attention_bias?" in message
    assert "new_norm meant" not in message
    assert message.endswith("pass --ignore-config-keys atention_bias,new_norm")
    assert read("llama", ("atention_bias", "new_norm"), atention_bias=True, new_norm="odd")


@pytest.mark.parametrize(("key", "values"), HARMLESS_AT.items())
def test_some_keys_matter_at_other_values(key: str, values: tuple[Any, ...], read: Any):
    for value in values:
        read(**{key: value})
    assert key in refusal(read, **{key: {"bits": 4}})


def test_irrelevant_keys_have_a_reason_and_pass(read: Any):
    assert all(IRRELEVANT.values())
    read(**dict.fromkeys(IRRELEVANT, 1))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"vocab_size": "64"}, "vocab_size must be a whole number, got '64'"),
        ({"vocab_size": 64.0}, "vocab_size must be a whole number, got 64.0"),
        ({"hidden_size": True}, "hidden_size must be a whole number, got True"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"num_hidden_layers": ...}, "config.json has no 'num_hidden_layers'"),
        ({"vocab_size": None}, "config.json has no 'vocab_size'"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number, got '1e-6'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number, got nan"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        ({"torch_dtype": 16}, "torch_dtype must be text, got 16"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object, got [1]"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number, got -1.0"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta must be a positive number, got '"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented; quire runs 'silu' or"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 must be a multiple of num_key_value"),
        ({"model_type": ...}, "config.json has no 'model_type'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "has quantization_config: quantized"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(keys: dict[str, Any], message: str, read: Any):
    assert message in refusal(read, **keys)


@pytest.mark.parametrize(
    ("model_type", "keys", "windows"),
    [
        ("mistral", {}, (4096,) * LAYERS),  # absent: what transformers assumes
        ("mistral", {"sliding_window": None}, (None,) * LAYERS),
        ("mistral", {"sliding_window": 32}, (32,) * LAYERS),
        ("qwen2", {"sliding_window": 32}, (None,) * LAYERS),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": False}, (None,) * LAYERS),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, (4096,) * LAYERS),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3},
            (None, None, None, 32),
        ),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32}, (None,) * LAYERS),  # from 28
        ("qwen2", {"use_sliding_window": True, "sliding_window": None}, (None,) * LAYERS),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 32,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (32, None, 32, None),
        ),
    ],
)
def test_windows_of_the_layers(
    model_type: str, keys: dict[str, Any], windows: tuple[int | None, ...], read: Any
):
    assert read(model_type, **keys).model.spec.windows == windows


@pytest.mark.parametrize(
    ("model_type", "keys", "message"),
    [
        ("mistral", {"sliding_window": "32"}, "sliding_window must be a whole number, got '32'"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        ("mistral", {"attention_bias": True}, "attention_bias = True is not implemented"),
        (
            "qwen2",
            {"layer_types": ["full_attention"]},
            "must list 4 layers, each full_attention or",
        ),
        ("qwen2", {"layer_types": ["linear_attention"] * 4}, "got 4: ['linear_attention'"),
        ("qwen2", {"layer_types": [["full_attention"]] * 4}, "layer_types must list 4 layers"),
        ("qwen3", {"layer_types": "full"}, "layer_types must be a list, got 'full'"),
        ("llama", {"sliding_window": 32}, "sliding_window = 32"),  # Llama has none: not ignored
    ],
)
def test_windows_that_cannot_be_run(model_type: str, keys: dict[str, Any], message: str, read: Any):
    assert message in refusal(read, model_type, **keys)


@pytest.mark.parametrize(
    ("rope", "longest", "reason"),
    [
        ({}, 256, "max_position_embeddings"),
        ({"type": "linear", "factor": 4.0}, 1024, "max_position_embeddings x rope factor"),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
            512,
            "original_max_position_embeddings x rope factor",
        ),
        ({"type": "yarn", "factor": 4.0}, 256, "max_position_embeddings"),
        (
            {"type": "dynamic", "factor": 4.0},
            256,
            "dynamic rope is run within the original length only",
        ),
        (
            {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64},
            64,
            "dynamic rope is run within the original length only",
        ),
    ],
)
def test_the_longest_context_and_why(rope: dict[str, Any], longest: int, reason: str, read: Any):
    info = read(rope_scaling=rope or None)
    assert (info.max_position, info.max_position_reason) == (longest, reason)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"type": "longrope"},
            "rope_scaling: rope type 'longrope' is not implemented; quire runs default, dynamic, ",
        ),
        ({"type": 3}, "rope type 3 is not implemented"),
        (
            {"type": "linear", "factor": 2.0, "fudge": 1},
            "unknown keys for rope type 'linear': fudge",
        ),
        (
            {"type": "default", "full_attention": {"rope_type": "yarn"}},
            "unknown keys for rope type 'default': full_attention",
        ),
        ({"type": "linear"}, "rope type 'linear' needs a positive factor, got None"),
        ({"type": "linear", "factor": "2"}, "rope type 'linear' needs a positive factor, got '2'"),
        ({"type": "yarn", "factor": True}, "rope type 'yarn' needs a positive factor, got True"),
        ({"type": "yarn", "mscale": -1}, "rope type 'yarn' needs a positive mscale, got -1"),
        ({"type": "yarn", "truncate": 1}, "truncate must be true or false, got 1"),
        ({"type": "dynamic", "factor": 0}, "rope type 'dynamic' needs a positive factor, got 0"),
        ({"type": "llama3", "factor": 8.0}, "needs a positive high_freq_factor, got None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1 is not implemented"),
    ],
)
def test_a_rope_that_cannot_be_run(rope: dict[str, Any], message: str, read: Any):
    assert message in refusal(read, rope_scaling=rope)


def test_rope_keys_that_do_not_matter(read: Any):
    plain = read().model.spec
    assert (
        read(rope_parameters={"rope_type": "default", "factor": 1.0, "odd": None}).model.spec
        == plain
    )
    assert read("llama", ("odd",), rope_scaling={"type": "linear", "factor": 2, "odd": 3})
    both = {"rope_type": "linear", "factor": 2.0}
    assert read(rope_scaling=both, rope_parameters=both)
    message = refusal(read, rope_scaling=both, rope_parameters=both | {"factor": 3.0})
    assert "rope_scaling and rope_parameters differ; remove the wrong one" in message


def test_an_unknown_model_type_names_the_nearest(read: Any):
    message = refusal(read, "qwen3_moe")
    assert "model_type 'qwen3_moe' is not implemented; the nearest is 'qwen3', and quire" in message
    assert message.endswith(f"runs {', '.join(model_types())}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json; a model folder needs config.json, *.safetensors and"),
        ("{", "config.json is not valid JSON"),
        ("[1]", "config.json must hold a JSON object, got list"),
        (b"\xff\xfe", "config.json is not valid JSON"),
    ],
)
def test_a_file_that_is_no_config(content: str | bytes | None, message: str, tmp_path: Path):
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        ConfigReader.from_folder(tmp_path)
    assert message in str(caught.value)
