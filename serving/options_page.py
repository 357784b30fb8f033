"""docs/options.md from the configs: python -m quire.serving.options_page > docs/options.md"""

import dataclasses

from ..engine.config import EngineConfig
from .config import ServeConfig
from .http_config import HttpConfig, LinkConfig
from .vllm_flags import flags_of_vllm

_HEAD = """# Options

An option is a flag (`--max-model-len`), an environment variable (`QUIRE_MAX_MODEL_LEN`) and, of the
servers, a key of the YAML file that `--config` names (`max-model-len: 4096`). Flags win over
variables, and these over the file. A flag of several values may be repeated, or have them with
commas (keys not); behind the model, `quire engine` and `quire serve` also take several words. This
page is generated from `engine/config.py`, `serving/config.py`, `serving/http_config.py` and
`serving/vllm_flags.py`.
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

_THEIRS = """
## vLLM's flags

Of `quire engine` and `quire serve`, those that are not options of ours. What has no effect is said
once at the start; what is refused ends the start with the reason.

| flag | |
|---|---|
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
            *(_THEIRS, _theirs()),
        )
    )


def _table(config: type) -> str:
    rows = [
        f"| `{field.name}` | {_shown(field.default)} | {field.metadata['help']} |\n"
        for field in dataclasses.fields(config)
    ]
    return _TABLE + "".join(rows)


def _theirs() -> str:
    rows = [f"| `{flag}` | {what} |\n" for flag, what in sorted(flags_of_vllm().items())]
    return "".join(rows)


def _shown(default: object) -> str:
    return "" if default is None or default == () else f"`{default}`"


if __name__ == "__main__":
    print(page(), end="")
