import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest
from quire.serving import collector


class Cycle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A collector that does nothing unasked, and is as it was afterwards."""
    monkeypatch.setattr(collector, "_LOOK_S", 0.01)
    thresholds = gc.get_threshold()
    gc.collect()
    gc.set_threshold(0)
    yield
    gc.set_threshold(*thresholds)


async def collect_for(looks: int, *, is_idle: bool) -> None:
    task = asyncio.create_task(collector.collect(lambda: is_idle))
    await asyncio.sleep(looks * 0.01 + 0.05)
    task.cancel()


@pytest.mark.parametrize("is_idle", [False, True])
def test_what_calls_leave_goes_without_the_collector_being_full(is_idle: bool) -> None:
    left = weakref.ref(Cycle())
    many = [[] for _ in range(2_000)]  # type: ignore[var-annotated]
    assert left() is not None
    asyncio.run(collect_for(2, is_idle=is_idle))
    assert left() is None
    assert many


def test_little_is_left_where_it_is() -> None:
    left = weakref.ref(Cycle())
    asyncio.run(collect_for(2, is_idle=True))
    assert left() is not None


def test_what_has_grown_old_goes_when_there_is_nothing_else_to_do() -> None:
    cycle = Cycle()
    left = weakref.ref(cycle)
    gc.collect(1)  # into the oldest generation
    del cycle
    asyncio.run(collect_for(2, is_idle=False))
    assert left() is not None
    asyncio.run(collect_for(2, is_idle=True))
    assert left() is None
