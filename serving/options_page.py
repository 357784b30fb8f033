"""docs/options.md from EngineConfig: python -m quire.serving.options_page > docs/options.md"""

import dataclasses

from ..engine.config import EngineConfig

_HEAD = """# Options

Keywords of `LLM(...)`, flags of `quire generate` (`--max-model-len`) and environment variables
(`QUIRE_MAX_MODEL_LEN`) are the same options. Flags win over variables. This page is generated from
`engine/config.py`.

| option | default | meaning |
|---|---|---|
"""


def page() -> str:
    """The whole page."""
    rows = [
        f"| `{field.name}` | {_shown(field.default)} | {field.metadata['help']} |"
        for field in dataclasses.fields(EngineConfig)
    ]
    return _HEAD + "\n".join(rows) + "\n"


def _shown(default: object) -> str:
    return "" if default is None or default == () else f"`{default}`"


if __name__ == "__main__":
    print(page(), end="")
