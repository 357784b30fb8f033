"""docs/options.md from the configs: python -m quire.serving.options_page > docs/options.md"""

import dataclasses

from ..engine.config import EngineConfig
from .config import ServeConfig
from .http_config import HttpConfig, LinkConfig

_HEAD = """# Options

An option is a flag (`--max-model-len`) and an environment variable (`QUIRE_MAX_MODEL_LEN`). Flags
win over variables. This page is generated from `engine/config.py`, `serving/config.py`
and `serving/http_config.py`.
"""

_ENGINE = """
## Engine

Of `quire generate`, `quire chat`, `quire engine` and `quire serve`, and keywords of `LLM(...)`.
"""

_SERVER = """
## Server

Of `quire engine` and `quire serve`; some of `quire shim`.
"""

_HTTP = """
## HTTP

Of `quire serve` and `quire shim`.
"""

_LINK = """
## Which engine

Of `quire shim`.
"""

_TABLE = """
| option | default | meaning |
|---|---|---|
"""


def page() -> str:
    """The whole page."""
    return "".join(
        (
            _HEAD,
            *(_ENGINE, _table(EngineConfig)),
            *(_SERVER, _table(ServeConfig)),
            *(_HTTP, _table(HttpConfig)),
            *(_LINK, _table(LinkConfig)),
        )
    )


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
