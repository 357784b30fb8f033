"""How many processors this process may keep busy, and what the CPU kernels make of them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..pallas_kernels.registry import Library, Missing

_SYSTEM = Path("/sys")


@dataclass(frozen=True)
class Processors:
    """count: threads that can work at once; reason: what sets it, for the start line."""

    count: int
    reason: str


@dataclass(frozen=True)
class Kernels:
    """What the CPU kernels are here, in words; use() gives them their threads."""

    line: str
    use: Callable[[], None]


def describe_kernels(library: Library | Missing, threads: int | None) -> Kernels:
    """threads: as asked for; None: as many as there are processors for them."""
    if isinstance(library, Missing):
        line = f"none, {library.reason}; XLA's ops serve, several times slower"
        return Kernels(line, lambda: None)
    found = usable_processors()
    count, reason = (found.count, found.reason) if threads is None else (threads, "cpu_threads")
    line = f"{library.level}, {count} thread{'s' if count > 1 else ''} ({reason})"
    return Kernels(line, lambda: library.set_threads(count))


def usable_processors(system: Path = _SYSTEM, allowed: frozenset[int] | None = None) -> Processors:
    """Physical cores that the process is allowed on, fewer if its container has a CPU quota.

    Two threads on the two halves of a core share its arithmetic: they gain nothing here.
    """
    if allowed is None:
        allowed = frozenset(os.sched_getaffinity(0))
    cores = {_core_of(system, processor) for processor in allowed}
    if len(cores) < len(allowed):
        found = Processors(len(cores), f"physical cores of {len(allowed)} processors")
    else:
        found = Processors(len(cores), "all processors" if len(cores) > 1 else "the only processor")
    quota = _quota(system)
    if quota is None or quota >= found.count:
        return found
    # Rounded down: a thread over the quota would be stopped for a part of every period, and the
    # others wait for it.
    return Processors(max(1, int(quota)), f"the CPU quota of {quota:g} processors")


def _core_of(system: Path, processor: int) -> str:
    """The processors that share a core, as the system lists them."""
    topology = system / f"devices/system/cpu/cpu{processor}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):
        try:
            return (topology / name).read_text(encoding="ascii").strip()
        except OSError:
            continue
    return str(processor)


def _quota(system: Path) -> float | None:
    """Processors' worth of time that the control group may use; None: no limit."""
    group = system / "fs/cgroup"
    try:
        limit, period = (group / "cpu.max").read_text(encoding="ascii").split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:  # the first version of control groups
        microseconds = int((group / "cpu/cpu.cfs_quota_us").read_text(encoding="ascii"))
        period_us = int((group / "cpu/cpu.cfs_period_us").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return microseconds / period_us if microseconds > 0 and period_us > 0 else None
