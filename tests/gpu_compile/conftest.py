"""Everything here compiles for an H200 that is not there: `make check-gpu-compile`."""

from functools import cache
from pathlib import Path

import pytest
from quire.bench.gpu import deviceless


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Left out by -m alone; a compiler that is not whole fails."""
    if "not gpu_compile" in config.option.markexpr:
        return True
    prepare()
    return None


@cache
def prepare() -> None:
    """Before a test imports jax."""
    deviceless.prepare()
