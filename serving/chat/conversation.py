"""What was said so far, and how it is written to a file."""

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...engine.errors import ConfigError
from ...engine.sampling_params import SamplingParams

ROLES = ("user", "assistant")


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
        file = Path(path).expanduser()
        unfinished = file.with_name(f"{file.name}.unfinished")
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        try:
            unfinished.write_text(
                json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
            )
            os.replace(unfinished, file)
        except OSError as error:
            raise ConfigError(
                f"cannot write {path}: {error.strerror}; give another file"
            ) from error

    def load(self, path: str) -> None:
        """Replace everything by what save wrote. Raises ConfigError and then changes nothing."""
        try:
            content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"cannot read {path}: {error.strerror}; give a file that /save wrote"
            ) from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON; give a file that /save wrote") from error
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
    SamplingParams(**sampling)
    return system, messages, sampling


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"role", "content"}
        and value["role"] in ROLES
        and isinstance(value["content"], str)
    )
