"""What all tests share: one folder of compiled programs, no network."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

REFERENCE = Path(__file__).parent / "reference"

# Before jax is imported anywhere: workers of one run, and the next run, share what they compile.
CACHE = Path(tempfile.gettempdir()) / f"quire-tests-{os.geteuid()}"
os.environ.setdefault("QUIRE_CACHE_DIR", str(CACHE))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The first example of a jitted test pays for its compilation; how long it takes is no property.
settings.register_profile("quire", deadline=None)
settings.load_profile("quire")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"
