"""One engine and one shim for a file's tests."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from quire.engine.startup import Engine
from quire.serving.keys import front_key

from ..gateway.gateways import SECRET, real_core, started_engine
from .shims import KEY, front_stage


@pytest.fixture(scope="session")
def demo() -> Iterator[Engine]:
    """The embedded model: it has a chat template, and answers that mean something."""
    with started_engine(model=None, max_model_len=1024) as engine:
        yield engine


@pytest.fixture(scope="module")
def front(demo: Engine) -> Iterator[Callable[..., Any]]:
    """Runs a coroutine with the shim."""
    with front_stage(real_core(demo), engine={"model": None}) as run:
        yield run


@pytest.fixture(scope="module")
def keyed(demo: Engine) -> Iterator[Callable[..., Any]]:
    """In front of an engine that wants keys."""
    core = real_core(demo)
    with front_stage(core, engine={"model": None}, api_key=(KEY,), key=front_key(SECRET)) as run:
        yield run
