"""model_type -> how to read its config and which model runs it. A new architecture is one file and
one line.
"""

import difflib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from . import llama, mistral, qwen2, qwen3
from .config_reader import ConfigError, ConfigReader
from .llama import Decoder, DecoderSpec

_READ_BY_MODEL_TYPE: dict[str, Callable[[ConfigReader], DecoderSpec]] = {
    "llama": llama.read_config,
    "mistral": mistral.read_config,
    "qwen2": qwen2.read_config,
    "qwen3": qwen3.read_config,
}


@dataclass(frozen=True)
class ModelInfo:
    """A model and what its config says beside the architecture."""

    model: Decoder
    model_type: str
    dtype: str | None  # the dtype the checkpoint says it was saved in
    max_position: int  # longest context the config promises
    max_position_reason: str  # why, for messages


def model_types() -> tuple[str, ...]:
    return tuple(_READ_BY_MODEL_TYPE)


def read_model(folder: Path, ignored_keys: Collection[str] = ()) -> ModelInfo:
    """The model of a checkpoint folder. Raises ConfigError with the way out."""
    reader = ConfigReader.from_folder(folder, ignored_keys)
    model_type = reader.take("model_type", str)
    if model_type not in _READ_BY_MODEL_TYPE:
        near = difflib.get_close_matches(model_type, _READ_BY_MODEL_TYPE, 1, cutoff=0.0)
        raise ConfigError(
            f"{folder / 'config.json'}: model_type {model_type!r} is not implemented; the nearest "
            f"is {near[0]!r}, and quire runs {', '.join(_READ_BY_MODEL_TYPE)}"
        )
    spec = _READ_BY_MODEL_TYPE[model_type](reader)
    old, new = reader.take("torch_dtype", str, None), reader.take("dtype", str, None)
    reader.finish()
    rope = spec.rope
    factor, original = rope.option("factor"), rope.option("original_max_position_embeddings")
    longest, reason = rope.max_position, "max_position_embeddings"
    if rope.rope_type == "linear":
        longest, reason = int(rope.max_position * factor), "max_position_embeddings x rope factor"
    elif rope.rope_type == "yarn" and factor and original:
        longest = max(rope.max_position, int(original * factor))
        reason = "original_max_position_embeddings x rope factor"
    elif rope.rope_type == "dynamic":
        # Beyond the original length the frequencies would change with every token.
        longest = int(original or rope.max_position)
        reason = "dynamic rope is run within the original length only"
    return ModelInfo(Decoder(spec), model_type, new or old, longest, reason)
