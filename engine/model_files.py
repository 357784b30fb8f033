"""A model's files, read and checked: config, weights' names, tokenizer, generation defaults.

Reads no weights. Whatever is wrong with the files is said here, before memory is taken.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ..layers.checkpoint import Checkpoint, CheckpointError, check_names
from ..layers.models.config_reader import ConfigError as ModelConfigError
from ..layers.models.registry import ModelInfo, read_model
from .config import EngineConfig
from .errors import ModelError, UnsupportedModel
from .model_source import ModelSource, find_model

if TYPE_CHECKING:
    from .text.tokenizer import Tokenizer
    from .text_files import TextFiles

_DTYPE_BY_NAME: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


@dataclass(frozen=True)
class ModelFiles:
    """What the files of one model say. checkpoint is None for dummy weights."""

    source: ModelSource
    info: ModelInfo
    text: "TextFiles"
    checkpoint: Checkpoint | None
    dtype: np.dtype[Any]
    eos_ids: frozenset[int]

    @property
    def kv_dtype(self) -> np.dtype[Any]:
        """float16 for bfloat16 models: the same size, and keys and values keep three bits more,
        which halves the error of the logits. Their range fits; what does not saturates.
        """
        is_bfloat16 = self.dtype == _DTYPE_BY_NAME["bfloat16"]
        return _DTYPE_BY_NAME["float16"] if is_bfloat16 else self.dtype

    def line(self) -> str:
        """One line for the start display."""
        revision = f" at {self.source.revision[:12]}" if self.source.revision else ""
        defaults = ", ".join(f"{k}={v}" for k, v in self.text.default_sampling.items()) or "none"
        return (
            f"model {self.source.name}{revision}: {self.info.model_type}, {self.dtype.name}; "
            f"sampling defaults of its own: {defaults}"
        )


def open_model(config: EngineConfig) -> ModelFiles:
    """Find a model, on a hub if need be, and read all but its weights. Raises UsageError."""
    # Who only runs a model's shape (bench/gpu) needs none of what texts need.
    from .text_files import open_text, read_json

    source = find_model(config.model, revision=config.revision, download_dir=config.download_dir)
    try:
        info = read_model(source.folder, config.ignore_config_keys)
    except ModelConfigError as error:
        raise UnsupportedModel(str(error)) from error
    checkpoint = None
    if config.load_format != "dummy":
        try:
            checkpoint = Checkpoint(source.folder)
            check_names(checkpoint, info.model.params(), info.model.is_unused)
        except CheckpointError as error:
            raise ModelError(str(error)) from error
    text = open_text(config, source)
    generation = {name: read_json(source.folder / name) for name in _GENERATION_FILES}
    return ModelFiles(
        source=source,
        info=info,
        text=text,
        checkpoint=checkpoint,
        dtype=_dtype(config, info),
        eos_ids=_eos_ids(source.folder, generation, text.tokenizer, info.model.vocab_size),
    )


_GENERATION_FILES = ("config.json", "generation_config.json")


def _eos_ids(
    folder: Path, generation: dict[str, dict[str, Any]], tokenizer: "Tokenizer", vocab: int
) -> frozenset[int]:
    """The end-of-sequence ids that any of the model's files names."""
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for values in generation.values():
        ids = values.get("eos_token_id")
        found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    bad = [i for i in found if not isinstance(i, int) or isinstance(i, bool)]
    if bad:
        raise ModelError(f"{folder}: eos_token_id must be token ids, got {bad}")
    return frozenset(i for i in found if 0 <= i < vocab)


def _dtype(config: EngineConfig, info: ModelInfo) -> np.dtype[Any]:
    name = config.dtype if config.dtype != "auto" else (info.dtype or "bfloat16")
    if name not in _DTYPE_BY_NAME:
        raise UnsupportedModel(
            f"the config's dtype {name!r} is not one of {', '.join(_DTYPE_BY_NAME)}; set dtype"
        )
    return _DTYPE_BY_NAME[name]
