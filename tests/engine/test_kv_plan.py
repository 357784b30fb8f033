"""How many pages, and how long a context: the options, the model and the memory together."""

from pathlib import Path

import pytest
from quire.engine.config import EngineConfig
from quire.engine.errors import ConfigError, MemoryPlanError
from quire.engine.kv_plan import (
    KVPlan,
    Sizes,
    gpu_kv_budget,
    longest_context,
    plan_kv,
    table_width,
)
from quire.engine.model_files import open_model
from quire.engine.page_pool import pages_held
from quire.layers.kv_pages import page_bytes, plan_layout

REFERENCE = Path(__file__).parent.parent / "reference"
MIB = 1 << 20


def plan(cache: Path, family: str = "llama32_tied", budget: int = MIB, **options: object) -> KVPlan:
    config = EngineConfig(model=str(REFERENCE / family), **options)  # type: ignore[arg-type]
    files = open_model(config)
    layout = plan_layout(files.info.model.kv_specs())
    sizes = Sizes("cpu", 8, 64, 16)
    one = page_bytes(layout, 16, files.kv_dtype)
    assert one == 3 * 2 * 2 * files.info.model.spec.head_dim * 16 * 2
    return plan_kv(config, files, layout, sizes, cache, lambda: budget)


def test_context_is_the_models_where_it_fits(tmp_path: Path) -> None:
    got = plan(tmp_path, budget=64 * MIB)
    assert got == KVPlan(8 * 128 + 1, 2048, 128)


def test_context_is_lowered_to_what_fits_and_said(tmp_path: Path) -> None:
    got = plan(tmp_path, budget=MIB)  # 85 pages of 12 KiB, rounded down to 84
    assert (got.num_pages, got.max_model_len) == (84, 83 * 16)
    assert got.note is not None
    assert "max_model_len lowered from 2048 to 1328" in got.note


def test_context_that_was_asked_for_is_refused_with_the_one_that_fits(tmp_path: Path) -> None:
    with pytest.raises(MemoryPlanError, match=r"needs 125 KV pages and 83 fit; set max_model_len"):
        plan(tmp_path, max_model_len=2000)
    with pytest.raises(ConfigError, match=r"= 4096 is over the model's 2048 .*at most"):
        plan(tmp_path, max_model_len=4096)


def test_nothing_fits(tmp_path: Path) -> None:
    with pytest.raises(MemoryPlanError, match=r"not even one KV page of 12.00 KiB .*raise kv"):
        plan(tmp_path, kv_cache_memory_bytes=100)


def test_page_count_stays_when_free_memory_moves_by_one_percent(tmp_path: Path) -> None:
    first = plan(tmp_path, budget=10 * MIB)
    for share in (0.99, 0.98, 1.01, 1.03):
        assert plan(tmp_path, budget=int(10 * MIB * share)) == first
    assert plan(tmp_path, budget=5 * MIB) != first


def test_windowed_model_needs_only_what_its_window_holds(tmp_path: Path) -> None:
    """A window of 32 and chunks of 64 tokens hold 7 pages, however long the sequence gets."""
    got = plan(tmp_path, "mistral_sliding", budget=12 * 6144)
    assert (got.num_pages, got.max_model_len) == (12, 2048)


def test_longest_context_is_the_last_that_fits() -> None:
    def pages_for(num_tokens: int) -> int:
        return pages_held(num_tokens, (None, 32), 16, 8)

    for num_pages in range(1, 30):
        longest = longest_context(num_pages, 500, 16, pages_for)
        assert pages_for(longest) < num_pages or longest == 0
        assert longest == 500 or pages_for(longest + 16) >= num_pages


def test_table_is_whole_chunks_of_attention() -> None:
    assert [table_width(n, 16) for n in (1, 128, 129)] == [8, 8, 16]
    assert table_width(100, 256) == 1


def test_gpu_budget_is_what_weights_and_workspace_leave() -> None:
    assert gpu_kv_budget(90, 25, 5, 10) == 50
    with pytest.raises(MemoryPlanError, match="leave nothing of 90 B for the KV cache; raise gpu_"):
        gpu_kv_budget(90, 75, 5, 10)
