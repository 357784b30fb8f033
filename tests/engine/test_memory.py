import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quire.engine import memory
from quire.engine.errors import MemoryPlanError
from quire.engine.memory import (
    HostMemory,
    KVRequest,
    MemoryPlan,
    PageCountMemo,
    choose_num_pages,
    round_pages,
)

GIB = 1 << 30
COUNTS = st.integers(1, 2**40)


def wanted(fits: int, *, pages_per_sequence: int = 100, max_sequences: int = 10**9) -> KVRequest:
    return KVRequest(fits * 512 + 511, 512, pages_per_sequence, max_sequences)


@pytest.mark.parametrize(
    ("count", "rounded"),
    [(-3, 0), (0, 0), (1, 1), (63, 63), (64, 64), (65, 64), (1023, 1008), (1024, 1024)],
)
def test_round_pages_goes_down_to_a_coarse_step(count: int, rounded: int):
    assert round_pages(count) == rounded


@given(COUNTS)
def test_round_pages_loses_little_and_is_stable(count: int):
    rounded = round_pages(count)
    assert count * 31 / 32 < rounded <= count
    assert round_pages(rounded) == rounded


@given(st.integers(20, 10**6), st.integers(-30, 30), st.integers(-10, 10))
def test_a_change_of_one_percent_keeps_the_remembered_count(
    max_sequences: int, distance: int, permille: int
):
    """Also around the count that all sequences can fill, which was not rounded and so moved."""
    most = 100 * max_sequences + 1
    fits = most + most * distance // 1000
    first = choose_num_pages(wanted(fits, max_sequences=max_sequences), None)
    later = wanted(fits + fits * permille // 1000, max_sequences=max_sequences)
    assert choose_num_pages(later, first) == first


@pytest.mark.parametrize(
    ("fits", "remembered", "chosen"),
    [
        (1000, None, 992),
        (1000, 950, 950),
        (1000, 1100, 1100),
        (1000, 1101, 992),
        (1000, 899, 992),
        (5000, None, 3001),  # what 30 sequences of 100 pages can fill, and the null page
        (5000, 992, 3001),
        (5000, 3200, 3001),  # never more than that
        (0, None, 0),
        (0, 500, 0),
    ],
)
def test_choose_num_pages(fits: int, remembered: int | None, chosen: int):
    assert choose_num_pages(wanted(fits, max_sequences=30), remembered) == chosen


def test_the_memo_remembers_by_key(tmp_path: Path):
    assert PageCountMemo(tmp_path, "a").read() is None
    PageCountMemo(tmp_path, "a").write(10)
    PageCountMemo(tmp_path, "b").write(20)
    PageCountMemo(tmp_path, "a").write(30)
    assert (PageCountMemo(tmp_path, "a").read(), PageCountMemo(tmp_path, "b").read()) == (30, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["page_counts.json"]


def test_the_memo_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    memo = PageCountMemo(tmp_path, "a")
    memo.write(10)

    def die(self: Path, target: Path) -> Path:
        assert json.loads(self.read_text()) == {"a": 11}  # complete before it takes the place
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        memo.write(11)
    assert memo.read() == 10


@pytest.mark.parametrize(
    "garbage",
    [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b'{"a": "10"}', b'{"a": true}', b'{"a": -5}', b"null"],
)
def test_a_damaged_memo_counts_as_none(garbage: bytes, tmp_path: Path):
    (tmp_path / "page_counts.json").write_bytes(garbage)
    memo = PageCountMemo(tmp_path, "a")
    assert memo.read() is None
    memo.write(12)
    assert memo.read() == 12


@pytest.mark.parametrize(
    ("num_pages", "fitting", "message"),
    [
        (
            8,
            112,
            "one sequence of max_model_len = 128 tokens needs 8 KV pages and 7 fit; set "
            "max_model_len to at most 112, or raise kv_cache_memory_bytes",
        ),
        (
            0,
            0,
            "one sequence of max_model_len = 128 tokens needs 8 KV pages and 0 fit; raise "
            "kv_cache_memory_bytes",
        ),
    ],
)
def test_require_room_names_the_length_that_fits(num_pages: int, fitting: int, message: str):
    with pytest.raises(MemoryPlanError) as caught:
        memory.require_room(num_pages, 8, 128, fitting)
    assert str(caught.value) == message


def test_require_room_passes_when_one_sequence_fits():
    memory.require_room(9, 8, 128, 128)
    with pytest.raises(MemoryPlanError):
        memory.require_room(8, 8, 128, 112)  # the null page is nobody's


def plan(limit: int, *, weights: int = GIB) -> MemoryPlan:
    return MemoryPlan(weights, 0, 0, 0, num_pages=1025, page_bytes=1 << 20, limit=limit)


def test_check_total_says_what_to_lower():
    memory.check_total(plan(GIB + (1025 << 20)))
    with pytest.raises(MemoryPlanError) as caught:
        memory.check_total(plan(2 * GIB))
    assert str(caught.value) == (
        "the plan needs 2.00 GiB (1.00 GiB of weights, 1.00 GiB of KV cache) and 2.00 GiB may be "
        f"used; set kv_cache_memory_bytes to at most {GIB}"
    )
    with pytest.raises(MemoryPlanError, match="use a smaller model or a machine with more memory"):
        memory.check_total(plan(GIB // 2))


def test_the_plan_is_printed_with_what_is_left():
    lines = plan(4 * GIB).lines(16)
    assert lines[0] == "weights      1.00 GiB"
    assert lines[4] == "KV cache     1.00 GiB  1,025 pages of 16 tokens: 16,384 tokens"
    assert lines[5] == "spare        2.00 GiB  of 4.00 GiB"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 << 20, "3.00 MiB"), (-GIB, "-1.00 GiB")],
)
def test_format_bytes(size: int, text: str):
    assert memory.format_bytes(size) == text


def test_the_cpu_budget_is_a_share_with_a_ceiling():
    assert memory.cpu_kv_budget(HostMemory(64 * GIB, 8 * GIB)) == 2 * GIB
    assert memory.cpu_kv_budget(HostMemory(64 * GIB, 60 * GIB)) == 4 * GIB


@pytest.mark.parametrize(
    ("limit", "used", "total", "available"),
    [(None, None, 1000, 600), (400, 100, 400, 300), (400, 500, 400, 0), (5000, 1, 1000, 600)],
)
def test_host_memory_honours_a_cgroup(
    limit: int | None,
    used: int | None,
    total: int,
    available: int,
    monkeypatch: pytest.MonkeyPatch,
):
    text = "MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 600 kB\nHugePages_Total: 0\n"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding=None: text)
    numbers = {"memory.max": limit, "memory.current": used}
    scaled = {name: n if n is None else n * 1024 for name, n in numbers.items()}
    monkeypatch.setattr(memory, "_cgroup_number", scaled.get)
    assert memory.host_memory() == HostMemory(total * 1024, available * 1024)
