"""What the text side of a model needs of its folder: tokenizer, chat templates, sampling defaults.

Read by the core's process and by the one in front of it, so free of JAX.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import EngineConfig
from .errors import ConfigError, ModelError, RequestError
from .model_source import ModelSource, find_model
from .sampling_params import SamplingParams
from .text.tokenizer import Tokenizer

_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class TextFiles:
    """default_sampling: of generation_config.json, in SamplingParams' names."""

    tokenizer: Tokenizer
    default_sampling: dict[str, Any]


def open_text(config: EngineConfig, source: ModelSource) -> TextFiles:
    """The text side of the model at `source`. Raises UsageError."""
    tokenizer = _load_tokenizer(source, config)
    if config.generation_config != "auto":
        return TextFiles(tokenizer, {})
    file = source.folder / "generation_config.json"
    defaults = _sampling_defaults(read_json(file))
    try:
        SamplingParams(**defaults)
    except RequestError as error:
        raise ModelError(f"{file}: {error}; generation_config='none' passes it over") from error
    return TextFiles(tokenizer, defaults)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no such file. Raises ModelError."""
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
