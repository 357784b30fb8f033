"""docs/options.md from the configs: python -m quire.serving.options_page > docs/options.md"""

import dataclasses

from ..engine.config import EngineConfig
from .config import ServeConfig

_HEAD = """# Options

An option is a flag (`--max-model-len`) and an environment variable (`QUIRE_MAX_MODEL_LEN`). Flags
win over variables. This page is generated from `engine/config.py` and `serving/config.py`.
"""

_ENGINE = """
## Engine

Of `quire generate`, `quire chat` and `quire engine`, and keywords of `LLM(...)`.
"""

_SERVER = """
## Server

Of `quire engine`.
"""

_TABLE = """
| option | default | meaning |
|---|---|---|
"""


def page() -> str:
    """The whole page."""
    return _HEAD + _ENGINE + _table(EngineConfig) + _SERVER + _table(ServeConfig)


def _table(config: type) -> str:
    rows = [
        f"| `{field.name}` | {_shown(field.default)} | {field.metadata['help']} |\n"
        for field in dataclasses.fields(config)
    ]
    return _TABLE + "".join(rows)


def _shown(default: object) -> str:
    return "" if default is None or default == () else f"`{default}`"


if __name__ == "__main__":
    print(page(), end="")
