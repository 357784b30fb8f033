"""A model's files, read and checked: config, weights' names, tokenizer, generation defaults.

Reads no weights. Whatever is wrong with the files is said here, before memory is taken.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..layers.checkpoint import Checkpoint, CheckpointError, check_names
from ..layers.models.config_reader import ConfigError as ModelConfigError
from ..layers.models.registry import ModelInfo, read_model
from .config import EngineConfig
from .errors import ConfigError, ModelError, RequestError, UnsupportedModel
from .model_source import ModelSource, find_model
from .sampling_params import SamplingParams
from .text.tokenizer import Tokenizer

_DTYPE_BY_NAME: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class ModelFiles:
    """What the files of one model say. checkpoint is None for dummy weights."""

    source: ModelSource
    info: ModelInfo
    tokenizer: Tokenizer
    checkpoint: Checkpoint | None
    dtype: np.dtype[Any]
    default_sampling: dict[str, Any]  # of generation_config.json, in SamplingParams' names
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
        defaults = ", ".join(f"{k}={v}" for k, v in self.default_sampling.items()) or "none"
        return (
            f"model {self.source.name}{revision}: {self.info.model_type}, {self.dtype.name}; "
            f"sampling defaults of its own: {defaults}"
        )


def open_model(config: EngineConfig) -> ModelFiles:
    """Find a model, on a hub if need be, and read all but its weights. Raises UsageError."""
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
    tokenizer = _load_tokenizer(source, config)
    texts = {name: _read_json(source.folder / name) for name in _GENERATION_FILES}
    defaults = _sampling_defaults(texts["generation_config.json"])
    if config.generation_config == "auto":
        _check_defaults(source.folder, defaults)
    return ModelFiles(
        source=source,
        info=info,
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        dtype=_dtype(config, info),
        default_sampling=defaults if config.generation_config == "auto" else {},
        eos_ids=_eos_ids(source.folder, texts, tokenizer, info.model.vocab_size),
    )


_GENERATION_FILES = ("config.json", "generation_config.json")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _load_tokenizer(source: ModelSource, config: EngineConfig) -> Tokenizer:
    folder = source.folder
    if config.tokenizer is not None:
        folder = find_model(
            config.tokenizer, revision=config.tokenizer_revision, download_dir=config.download_dir
        ).folder
    template = config.chat_template
    if template is not None and "{" not in template:
        path = Path(os.path.expanduser(template))
        if not path.is_file():
            raise ConfigError(
                f"chat_template {template!r} is neither a file nor a Jinja template; give one"
            )
        template = path.read_text(encoding="utf-8")
    return Tokenizer.from_folder(folder, chat_template=template)


def _sampling_defaults(generation: dict[str, Any]) -> dict[str, Any]:
    defaults = {k: generation[k] for k in _SAMPLING_DEFAULTS if generation.get(k) is not None}
    if generation.get("do_sample") is False:
        defaults["temperature"] = 0.0
    if generation.get("max_new_tokens") is not None:
        defaults["max_tokens"] = generation["max_new_tokens"]
    return defaults


def _check_defaults(folder: Path, defaults: dict[str, Any]) -> None:
    try:
        SamplingParams(**defaults)
    except RequestError as error:
        raise ModelError(
            f"{folder / 'generation_config.json'}: {error}; generation_config='none' passes it over"
        ) from error


def _eos_ids(
    folder: Path, texts: dict[str, dict[str, Any]], tokenizer: Tokenizer, vocab: int
) -> frozenset[int]:
    """The end-of-sequence ids that any of the model's files names."""
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts.values():
        ids = text.get("eos_token_id")
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
