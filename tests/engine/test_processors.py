"""How many threads the kernels get, from a made-up /sys."""

from pathlib import Path

import pytest
from quire.engine.processors import usable_processors


def system(
    folder: Path,
    cores: list[list[int]],
    quota: str | None = None,
    *,
    is_first_version: bool = False,
) -> Path:
    for core in cores:
        for processor in core:
            topology = folder / f"devices/system/cpu/cpu{processor}/topology"
            topology.mkdir(parents=True)
            (topology / "core_cpus_list").write_text(",".join(map(str, core)) + "\n")
    group = folder / "fs/cgroup"
    if quota is not None and is_first_version:
        (group / "cpu").mkdir(parents=True)
        limit, period = quota.split()
        (group / "cpu/cpu.cfs_quota_us").write_text(limit)
        (group / "cpu/cpu.cfs_period_us").write_text(period)
    elif quota is not None:
        group.mkdir(parents=True)
        (group / "cpu.max").write_text(quota + "\n")
    return folder


@pytest.mark.parametrize(
    ("cores", "allowed", "count", "reason"),
    [
        ([[0], [1]], {0, 1}, 2, "all processors"),
        ([[0], [1]], {1}, 1, "the only processor"),
        ([[0, 2], [1, 3]], {0, 1, 2, 3}, 2, "physical cores of 4 processors"),
        ([[0, 2], [1, 3]], {0, 2, 3}, 2, "physical cores of 3 processors"),
        ([[0, 2], [1, 3]], {0, 1}, 2, "all processors"),
    ],
)
def test_one_thread_for_each_core_it_may_use(
    tmp_path: Path, cores: list[list[int]], allowed: set[int], count: int, reason: str
):
    found = usable_processors(system(tmp_path, cores), frozenset(allowed))
    assert (found.count, found.reason) == (count, reason)


@pytest.mark.parametrize("is_first_version", [False, True])
@pytest.mark.parametrize(
    ("quota", "count"), [("50000 100000", 1), ("250000 100000", 2), ("390000 100000", 3)]
)
def test_a_quota_is_rounded_down_to_whole_threads(
    tmp_path: Path, quota: str, count: int, is_first_version: bool
):
    made = system(tmp_path, [[n] for n in range(4)], quota, is_first_version=is_first_version)
    found = usable_processors(made, frozenset(range(4)))
    assert found.count == count
    assert found.reason == f"the CPU quota of {int(quota.split()[0]) / 100000:g} processors"


@pytest.mark.parametrize("quota", ["max 100000", "800000 100000", "-1 100000", "broken"])
def test_no_quota_or_a_wide_one_changes_nothing(tmp_path: Path, quota: str):
    made = system(tmp_path, [[0], [1]], quota)
    if quota.startswith("-1"):
        made = system(tmp_path / "first", [[0], [1]], quota, is_first_version=True)
    assert usable_processors(made, frozenset({0, 1})).count == 2


def test_without_topology_every_processor_is_a_core(tmp_path: Path):
    assert usable_processors(tmp_path, frozenset({3, 5})).count == 2
