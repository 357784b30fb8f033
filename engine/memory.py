"""The memory plan: what the engine will hold, printed before it is allocated, and how many KV pages
fit.

The page count is a shape of every program, so it must not move with the weather: it is rounded down
to a coarse step and remembered beside the compile cache.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from .errors import MemoryPlanError

_GIB = 1 << 30
CPU_KV_BYTES = 4 * _GIB
CPU_KV_SHARE = 0.25
# A remembered page count is kept while it is this close to what would be chosen now.
_REMEMBERED_SHARE = 0.1


@dataclass(frozen=True)
class HostMemory:
    """Bytes this process may use in all, and what of it is free now. Honours a cgroup limit."""

    total: int
    available: int


def host_memory() -> HostMemory:
    fields = {}
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, value = line.split(":")
        fields[name] = int(value.split()[0]) * 1024
    total, available = fields["MemTotal"], fields["MemAvailable"]
    limit = _cgroup_number("memory.max")
    if limit is not None and limit < total:
        used = _cgroup_number("memory.current") or 0
        total, available = limit, min(available, max(limit - used, 0))
    return HostMemory(total, available)


def _cgroup_number(name: str) -> int | None:
    try:
        text = (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose. `limit` is what may be used in all."""

    weights: int
    rows: int
    workspace: int
    executables: int
    num_pages: int
    page_bytes: int
    limit: int

    @property
    def kv(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def used(self) -> int:
        return self.weights + self.rows + self.workspace + self.executables + self.kv

    def lines(self, page_size: int) -> list[str]:
        """The plan as shown at start."""
        tokens = (self.num_pages - 1) * page_size
        table = [
            ("weights", self.weights, ""),
            ("rows", self.rows, ""),
            ("workspace", self.workspace, ""),
            ("programs", self.executables, ""),
            (
                "KV cache",
                self.kv,
                f"{self.num_pages:,} pages of {page_size} tokens: {tokens:,} tokens",
            ),
            ("spare", self.limit - self.used, f"of {format_bytes(self.limit)}"),
        ]
        return [
            f"{name:<10} {format_bytes(size):>10}  {note}".rstrip() for name, size, note in table
        ]


def format_bytes(size: int) -> str:
    for unit, scale in (("GiB", _GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(size) >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} B"


def round_pages(count: int) -> int:
    """Down to a multiple of 2^floor(log2 count) / 32: at most 3 % lost, and most changes change
    nothing.
    """
    if count < 1:
        return 0
    step = max(1, (1 << (count.bit_length() - 1)) // 32)
    return count // step * step


@dataclass(frozen=True)
class KVRequest:
    """What the page count follows from. pages_per_sequence: one request of max_model_len, all
    groups.
    """

    budget_bytes: int
    page_bytes: int
    pages_per_sequence: int
    max_sequences: int


def choose_num_pages(wanted: KVRequest, remembered: int | None) -> int:
    """Pages of the pool, the null page included; never more than all sequences can fill."""
    most = wanted.pages_per_sequence * wanted.max_sequences + 1
    fits = min(wanted.budget_bytes // wanted.page_bytes, most)
    if (
        remembered is not None
        and remembered <= most
        and abs(remembered - fits) <= _REMEMBERED_SHARE * fits
    ):
        return remembered
    return most if fits == most else round_pages(fits)


def cpu_kv_budget(memory: HostMemory) -> int:
    return int(min(CPU_KV_BYTES, CPU_KV_SHARE * memory.available))


def require_room(num_pages: int, needed: int, max_model_len: int, longest: int) -> None:
    """Raise MemoryPlanError unless one sequence of max_model_len fits the pool."""
    if num_pages - 1 >= needed:
        return
    lower = f"set max_model_len to at most {longest}, or " if longest else ""
    raise MemoryPlanError(
        f"one sequence of max_model_len = {max_model_len} tokens needs {needed} KV pages and "
        f"{max(num_pages - 1, 0)} fit; {lower}raise kv_cache_memory_bytes"
    )


class PageCountMemo:
    """Remembers the page count of a configuration beside the compile cache."""

    def __init__(self, folder: Path, key: str) -> None:
        self._path = folder / "page_counts.json"
        self._key = key

    def read(self) -> int | None:
        value = self._all().get(self._key)
        return value if isinstance(value, int) and value > 1 else None

    def write(self, num_pages: int) -> None:
        counts = self._all()
        if counts.get(self._key) == num_pages:
            return
        counts[self._key] = num_pages
        # A reader sees the old file or the new one, never half of one.
        temporary = self._path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(counts, indent=0), encoding="utf-8")
        temporary.replace(self._path)

    def _all(self) -> dict[str, int]:
        try:
            counts = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return counts if isinstance(counts, dict) else {}


def check_total(plan: MemoryPlan) -> None:
    """Raise MemoryPlanError when the plan is over the limit."""
    if plan.used <= plan.limit:
        return
    missing = plan.used - plan.limit
    spare_for_kv = plan.kv - missing
    if spare_for_kv > 0:
        way_out = f"set kv_cache_memory_bytes to at most {spare_for_kv}"
    else:
        way_out = "use a smaller model or a machine with more memory"
    raise MemoryPlanError(
        f"the plan needs {format_bytes(plan.used)} ({format_bytes(plan.weights)} of weights, "
        f"{format_bytes(plan.kv)} of KV cache) and {format_bytes(plan.limit)} may be used; "
        f"{way_out}"
    )
