"""Reads config.json so that every key is accounted for: used, known not to matter, or refused by
name.

A model we would run wrongly is worse than one we do not run. The keys that do not matter stand in
one table with the reason; a key that matters only at some values is listed with the values that are
harmless.
"""

import difflib
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..rope import RopeConfig, rope_types

_TRAINING = "training only"
_GENERATION = "generation default; read from generation_config.json or the tokenizer"
_LABEL = "classification heads only"
_OUTPUT = "selects what transformers returns"
_ORIGIN = "says where the file came from"
_KERNEL = "selects a kernel of transformers"
_CODE = "names remote code, which is never run; architectures are built in"

# key -> why it cannot change the logits
IRRELEVANT = {
    "_attn_implementation": _KERNEL,
    "_attn_implementation_autoset": _KERNEL,
    "_flash_attn_2_enabled": _KERNEL,
    "_name_or_path": _ORIGIN,
    "architectures": "model_type decides",
    "attention_dropout": _TRAINING,
    "attn_implementation": _KERNEL,
    "auto_map": _CODE,
    "bad_words_ids": _GENERATION,
    "begin_suppress_tokens": _GENERATION,
    "bos_token_id": _GENERATION,
    "cross_attention_hidden_size": "cross attention only",
    "decoder_start_token_id": _GENERATION,
    "diversity_penalty": _GENERATION,
    "do_sample": _GENERATION,
    "early_stopping": _GENERATION,
    "encoder_no_repeat_ngram_size": _GENERATION,
    "eos_token_id": _GENERATION,
    "exponential_decay_length_penalty": _GENERATION,
    "finetuning_task": _ORIGIN,
    "forced_bos_token_id": _GENERATION,
    "forced_eos_token_id": _GENERATION,
    "gradient_checkpointing": _TRAINING,
    "hidden_dropout": _TRAINING,
    "id2label": _LABEL,
    "initializer_range": _TRAINING,
    "label2id": _LABEL,
    "length_penalty": _GENERATION,
    "max_length": _GENERATION,
    "max_sequence_length": "max_position_embeddings decides",  # first Llama conversions
    "max_window_layers": "read only with a sliding window",
    "min_length": _GENERATION,
    "model_max_length": "the tokenizer's limit; max_position_embeddings decides",
    "no_repeat_ngram_size": _GENERATION,
    "num_beam_groups": _GENERATION,
    "num_beams": _GENERATION,
    "num_labels": _LABEL,
    "num_return_sequences": _GENERATION,
    "output_attentions": _OUTPUT,
    "output_hidden_states": _OUTPUT,
    "output_scores": _OUTPUT,
    "pad_token_id": _GENERATION,
    "prefix": _GENERATION,
    "pretraining_tp": "splits matrix products without changing their sum",
    "problem_type": _LABEL,
    "remove_invalid_values": _GENERATION,
    "repetition_penalty": _GENERATION,
    "resid_pdrop": _TRAINING,
    "return_dict": _OUTPUT,
    "return_dict_in_generate": _OUTPUT,
    "sep_token_id": _GENERATION,
    "suppress_tokens": _GENERATION,
    "task_specific_params": _GENERATION,
    "temperature": _GENERATION,
    "tf_legacy_loss": _TRAINING,
    "tokenizer_class": "the tokenizer's files decide",
    "top_k": _GENERATION,
    "top_p": _GENERATION,
    "torchscript": _OUTPUT,
    "transformers.js_config": "settings of another runtime",
    "transformers_version": _ORIGIN,
    "typical_p": _GENERATION,
    "unsloth_fixed": _ORIGIN,
    "unsloth_version": _ORIGIN,
    "use_bfloat16": _TRAINING,
    "use_cache": "quire always caches",
}

# key -> the values at which it does not change the logits
HARMLESS_AT: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (1.0, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False, None),  # files of Qwen2.5 and of distilled Qwen2
}
# key -> what to do about it, where ignoring it is no way out
REFUSED = {"quantization_config": "quantized checkpoints are not implemented yet; take another one"}

_ROPE_KEYS = {
    "default": (),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
        "mscale", "mscale_all_dim", "truncate",
    ),
}  # fmt: skip
_ROPE_NEEDED = {"linear": ("factor",), "llama3": _ROPE_KEYS["llama3"]}
# Keys of some rope type; published files carry them beside the default type, where nobody reads
# them.
_ANY_ROPE_KEY = {key for keys in _ROPE_KEYS.values() for key in keys}


class ConfigError(ValueError):
    """config.json is missing, unreadable, or says something that would be run wrongly."""


_MISSING = object()
_WORDS = {
    int: "a whole number", float: "a number", str: "text", bool: "true or false",
    list: "a list", dict: "an object",
}  # fmt: skip


def _is_a(value: Any, kind: type) -> bool:
    """Whether a JSON value is of a kind; a whole number is a number too, NaN is not one."""
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, kind)


class ConfigReader:
    """The keys of one config.json; `take` uses one, `finish` refuses what nobody used."""

    def __init__(self, keys: dict[str, Any], source: str, ignored: Collection[str] = ()) -> None:
        self._keys = keys
        self._source = source
        self._ignored = frozenset(ignored)
        self._taken: set[str] = set()

    @classmethod
    def from_folder(cls, folder: Path, ignored: Collection[str] = ()) -> "ConfigReader":
        path = folder / "config.json"
        if not path.is_file():
            raise ConfigError(
                f"{folder} has no config.json; a model folder needs config.json, *.safetensors and "
                "tokenizer.json. Give the folder that holds them"
            )
        try:
            keys = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(
                f"{path} is not valid JSON ({error}); download the file again"
            ) from error
        if not isinstance(keys, dict):
            raise ConfigError(f"{path} must hold a JSON object, got {type(keys).__name__}")
        return cls(keys, str(path), ignored)

    def take(self, key: str, kind: type, default: Any = _MISSING) -> Any:
        """The value of a key, as `kind`; null counts as absent. `default` is what transformers
        assumes.
        """
        self._taken.add(key)
        value = self._keys.get(key)
        if value is None:
            if default is _MISSING:
                raise ConfigError(f"{self._source} has no {key!r}, which every such model needs")
            return default
        if not _is_a(value, kind):
            raise ConfigError(f"{self._source}: {key} must be {_WORDS[kind]}, got {value!r}")
        return kind(value)

    def has(self, key: str) -> bool:
        """Whether the file has the key, be it null."""
        return key in self._keys

    def take_positive(self, key: str, default: Any = _MISSING) -> int:
        value = self.take(key, int, default)
        if value < 1:
            raise ConfigError(f"{self._source}: {key} must be at least 1, got {value}")
        return int(value)

    def take_window(self, key: str, *, absent: int) -> int | None:
        """A sliding window in tokens; null switches it off, an absent key means `absent`."""
        self._taken.add(key)
        if key not in self._keys:
            return absent
        return None if self._keys[key] is None else self.take_positive(key)

    def take_layer_types(self, num_layers: int) -> list[str] | None:
        """The kind of each layer, where the file says it."""
        types: list[str] | None = self.take("layer_types", list, None)
        known = ("full_attention", "sliding_attention")
        if types is not None and (len(types) != num_layers or any(t not in known for t in types)):
            raise ConfigError(
                f"{self._source}: layer_types must list {num_layers} layers, each "
                f"{' or '.join(known)}; got {len(types)}: {types[:4]}"
            )
        return types

    def require(self, key: str, allowed: tuple[Any, ...], default: Any) -> None:
        """Use a key of which only some values are implemented."""
        self._taken.add(key)
        value = self._keys.get(key, default)
        if value not in allowed:
            raise ConfigError(
                f"{self._source}: {key} = {value!r} is not implemented; quire runs "
                + " or ".join(repr(a) for a in allowed)
            )

    def take_rope(self, head_dim: int, *, default_theta: float = 10000.0) -> RopeConfig:
        """The rope, from rope_theta + rope_scaling (older files) or rope_parameters (newer)."""
        old = self.take("rope_scaling", dict, {})
        new = self.take("rope_parameters", dict, {})
        where = f"{self._source}: {'rope_parameters' if new else 'rope_scaling'}"
        if old and new and old != new:
            raise ConfigError(
                f"{self._source}: rope_scaling and rope_parameters differ; remove the wrong one"
            )
        options = dict(new or old)
        theta = self.take("rope_theta", float, default_theta)
        inner = options.pop("rope_theta", None)
        theta = theta if inner is None else inner
        if not _is_a(theta, float) or theta <= 0:
            raise ConfigError(f"{where}: rope_theta must be a positive number, got {theta!r}")
        legacy = options.pop("type", None)
        rope_type = options.pop("rope_type", legacy) or "default"
        if rope_type not in rope_types():
            raise ConfigError(
                f"{where}: rope type {rope_type!r} is not implemented; quire runs "
                f"{', '.join(rope_types())}"
            )
        if options.pop("partial_rotary_factor", 1.0) not in (None, 1.0):
            raise ConfigError(
                f"{where}: partial_rotary_factor other than 1 is not implemented here"
            )
        kept = self._rope_options(rope_type, options, where)
        max_position = self.take_positive("max_position_embeddings")
        return RopeConfig(
            rope_type, float(theta), head_dim, max_position, tuple(sorted(kept.items()))
        )

    def _rope_options(
        self, rope_type: str, options: dict[str, Any], where: str
    ) -> dict[str, float | bool]:
        """The options of a rope type that are there, each checked."""
        unknown = set(options) - set(_ROPE_KEYS[rope_type]) - self._ignored
        harmless = _ANY_ROPE_KEY if rope_type == "default" else ()
        unknown = {k for k in unknown if options[k] is not None and k not in harmless}
        if unknown:
            raise ConfigError(
                f"{where}: unknown keys for rope type {rope_type!r}: {', '.join(sorted(unknown))}"
            )
        kept = {k: v for k in _ROPE_KEYS[rope_type] if (v := options.get(k)) is not None}
        for key in sorted({*kept, *_ROPE_NEEDED.get(rope_type, ())} - {"truncate"}):
            value: Any = kept.get(key)
            # transformers takes a zero of these as not given
            is_given = value != 0 or key not in (
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
            )
            if not _is_a(value, float) or (is_given and value <= 0):
                raise ConfigError(
                    f"{where}: rope type {rope_type!r} needs a positive {key}, got {value!r}"
                )
        if not isinstance(kept.get("truncate", True), bool):
            raise ConfigError(f"{where}: truncate must be true or false, got {kept['truncate']!r}")
        return kept

    def finish(self) -> None:
        """Raise ConfigError naming every key that nobody accounts for."""
        left = {
            key: value
            for key, value in self._keys.items()
            if key not in self._taken
            and key not in IRRELEVANT
            and key not in self._ignored
            and key != "model_type"
            and not (key in HARMLESS_AT and value in HARMLESS_AT[key])
        }
        if not left:
            return
        for key in left.keys() & REFUSED.keys():
            raise ConfigError(f"{self._source} has {key}: {REFUSED[key]}")
        listed = ", ".join(f"{k} = {json.dumps(v)[:60]}" for k, v in sorted(left.items()))
        near = {k: difflib.get_close_matches(k, self._taken, 1) for k in left}
        hints = "".join(f"; is {k} meant to be {m[0]}?" for k, m in sorted(near.items()) if m)
        raise ConfigError(
            f"{self._source} has keys that quire does not know, so the model might be run wrongly: "
            f"{listed}{hints}. If they cannot change the answer, pass --ignore-config-keys "
            f"{','.join(sorted(left))}"
        )
