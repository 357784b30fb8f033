"""What the processes of an engine hold once a load is over."""

import asyncio
import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .engines import Client, until

# Of all processes between two measurements; of one, if that is more than two arenas of Python's
# allocator, which gives nothing smaller back.
MOST_GROWTH, ARENAS_BYTES = 0.02, 2 << 20
STILL_S = 3.0  # longer than what is cleared up when nothing else is to be done


@dataclass(frozen=True)
class Footprint:
    """What a process holds."""

    num_fds: int
    anon_bytes: int

    @classmethod
    def of(cls, pid: int) -> "Footprint":
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        assert found is not None
        return cls(len(list(Path(f"/proc/{pid}/fd").iterdir())), int(found[1]) << 10)

    def allows(self, later: "Footprint") -> bool:
        most = max(ARENAS_BYTES, MOST_GROWTH * self.anon_bytes)
        return later.anon_bytes - self.anon_bytes <= most


Held = dict[str, Footprint]


async def settled(client: Client, pids: Callable[[], dict[str, int]]) -> Held:
    """By the names of `pids`, once nothing is open and nothing changes."""
    gc.collect()  # a channel of ours is closed when the last of its calls is forgotten

    def is_idle(metrics: dict[str, float]) -> bool:
        num_open = sum(metrics[f"quire_{name}"] for name in ("requests_open", "requests_queued"))
        num_held = metrics["quire_kv_pages"] - metrics["quire_kv_pages_free"]
        return not (num_open or num_held or metrics["quire_queued_tokens"])

    await client.until_metrics(is_idle)
    seen: Held = {}

    async def is_still() -> bool:
        nonlocal seen
        before = seen
        await asyncio.sleep(STILL_S)
        seen = {name: Footprint.of(pid) for name, pid in pids().items()}
        return seen == before

    await until(is_still)
    return seen


def require_no_growth(before: Held, after: Held) -> None:
    for name, one in before.items():
        assert one.allows(after[name]), f"{name}: {one} became {after[name]}"
    total, total_after = (sum(p.anon_bytes for p in held.values()) for held in (before, after))
    assert total_after <= (1 + MOST_GROWTH) * total
