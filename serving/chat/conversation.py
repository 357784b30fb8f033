"""What was said so far, and how it is written to a file."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...engine.errors import ConfigError, RequestError
from ...engine.sampling_params import SamplingParams

ROLES = ("user", "assistant")
# A home that nobody has is a RuntimeError, a name with a NUL or without a name a ValueError.
_FILE_FAULTS = (OSError, ValueError, RuntimeError)


@dataclass
class Conversation:
    """sampling: what /set changed, in SamplingParams' names."""

    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)

    def prompt(self) -> list[dict[str, str]]:
        """The messages as a chat template takes them."""
        if self.system is None:
            return list(self.messages)
        return [{"role": "system", "content": self.system}, *self.messages]

    def save(self, path: str) -> None:
        """Written beside and then moved: the old file stays until the new one is whole. Raises
        ConfigError.
        """
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        try:
            file = Path(path).expanduser()
            unfinished = file.with_name(f"{file.name}.unfinished")
            try:
                # Escaped: half a surrogate pair, which a terminal can send, is no UTF-8.
                unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
                os.replace(unfinished, file)
            finally:
                unfinished.unlink(missing_ok=True)
        except _FILE_FAULTS as error:
            raise ConfigError(f"cannot write {path}: {_why(error)}; give another file") from error

    def load(self, path: str) -> None:
        """Replace everything by what save wrote. Raises ConfigError and then changes nothing."""
        try:
            content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path} is not JSON; give a file that /save wrote") from error
        except _FILE_FAULTS as error:
            raise ConfigError(
                f"cannot read {path}: {_why(error)}; give a file that /save wrote"
            ) from error
        self.system, self.messages, self.sampling = _checked(content, path)


def _checked(content: Any, path: str) -> tuple[str | None, list[dict[str, str]], dict[str, Any]]:
    way_out = "give a file that /save wrote"
    if not isinstance(content, dict) or set(content) != {f.name for f in fields(Conversation)}:
        raise ConfigError(f"{path} is not a conversation; {way_out}")
    system, messages, sampling = content["system"], content["messages"], content["sampling"]
    if system is not None and not isinstance(system, str):
        raise ConfigError(f"system in {path} must be text or null; {way_out}")
    if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
        raise ConfigError(
            f'messages in {path} must be objects with a "role" of user or assistant and a text as '
            f'"content"; {way_out}'
        )
    if not isinstance(sampling, dict):
        raise ConfigError(f"sampling in {path} must be an object; {way_out}")
    check_sampling(sampling)
    return system, messages, sampling


def check_sampling(sampling: Mapping[str, Any]) -> None:
    """Raises RequestError for what a conversation cannot be sampled with."""
    if SamplingParams(**sampling).n != 1:
        raise RequestError(
            "n must be 1 in a conversation; quire generate gives several answers", field="n"
        )


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"role", "content"}
        and value["role"] in ROLES
        and isinstance(value["content"], str)
    )
