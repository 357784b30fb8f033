import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from quire.engine.page_pool import PagePool
from quire.engine.prefix_cache import PrefixCache, first_visible_page
from quire.engine.request import FinishReason, Request
from quire.engine.sampling_params import SamplingParams
from quire.engine.scheduler import Scheduler, SchedulerConfig

PAGE_SIZE = 2


def make_cache(
    windows: Sequence[int | None] = (None,), num_pages: int = 50, secret: bytes = b"secret"
) -> tuple[PagePool, PrefixCache]:
    pool = PagePool(num_pages)
    return pool, PrefixCache(pool, PAGE_SIZE, windows, secret)


def make_request(token_ids: Sequence[int], *, cache_salt: bytes = b"") -> Request:
    return Request("r", token_ids, SamplingParams(max_tokens=8), 0, cache_salt=cache_salt)


def compute(
    pool: PagePool, cache: PrefixCache, token_ids: Sequence[int], *, cache_salt: bytes = b""
) -> Request:
    """A request that owns fresh pages for all its tokens, all computed and registered."""
    request = make_request(token_ids, cache_salt=cache_salt)
    num_pages = -(-len(token_ids) // PAGE_SIZE)
    request.pages = [pool.allocate(num_pages) or [] for _ in cache._windows]
    request.num_computed = len(token_ids)
    cache.register(request)
    cache.audit()
    return request


@pytest.mark.parametrize(
    ("position", "window", "page"),
    [(9, None, 0), (9, 1, 4), (9, 2, 4), (9, 3, 3), (10, 1, 5), (10, 2, 4), (3, 100, 0), (0, 1, 0)],
)
def test_first_visible_page_of_a_window(position: int, window: int | None, page: int):
    assert first_visible_page(position, window, PAGE_SIZE) == page
    if window is not None:
        keys = range(max(0, position - window + 1), position + 1)
        assert page == min(key // PAGE_SIZE for key in keys)


@pytest.mark.parametrize(
    ("token_ids", "num_tokens"),
    [
        ([1, 2, 3, 4, 5], 4),
        ([1, 2, 3, 4, 5, 6, 7], 4),  # the fifth token's page was never full
        ([1, 2, 3, 4], 2),  # the last token is recomputed, it has to give logits
        ([1, 2, 3], 2),
        ([1, 2], 0),
        ([1, 9, 3, 4, 5], 0),
        ([1, 2, 9, 4, 5], 2),
    ],
)
def test_prefix_cache_finds_the_longest_full_pages(token_ids: list[int], num_tokens: int):
    pool, cache = make_cache()
    owner = compute(pool, cache, [1, 2, 3, 4, 5])
    hit = cache.lookup(make_request(token_ids))
    assert hit.num_tokens == num_tokens
    assert hit.pages == [owner.pages[0][: num_tokens // PAGE_SIZE]]


def test_prefix_cache_needs_the_same_page_at_the_same_place():
    pool, cache = make_cache()
    compute(pool, cache, [1, 2, 3, 4])
    assert cache.lookup(make_request([3, 4, 1, 2, 5])).num_tokens == 0


def test_prefix_cache_does_not_cross_salts():
    pool, cache = make_cache()
    compute(pool, cache, [1, 2, 3], cache_salt=b"alice")
    assert cache.lookup(make_request([1, 2, 3], cache_salt=b"bob")).num_tokens == 0
    assert cache.lookup(make_request([1, 2, 3], cache_salt=b"alice")).num_tokens == 2


def test_prefix_cache_root_parts_are_not_just_joined():
    pool, cache = make_cache()
    owner = make_request([1, 2, 3])
    owner.root_parts = (b"ab", b"c")
    owner.pages, owner.num_computed = [pool.allocate(2) or []], 3
    cache.register(owner)
    other = make_request([1, 2, 3])
    other.root_parts = (b"a", b"bc")
    assert cache.lookup(other).num_tokens == 0


def test_prefix_cache_hashes_depend_on_the_secret_and_only_on_it():
    hashes = []
    for secret in (b"one", b"one", b"two"):
        pool, cache = make_cache(secret=secret)
        hashes.append(compute(pool, cache, [1, 2, 3, 4]).page_hashes)
    assert hashes[0] == hashes[1]
    assert set(hashes[0]).isdisjoint(hashes[2])


def test_prefix_cache_keeps_the_older_of_two_equal_pages():
    pool, cache = make_cache()
    older = compute(pool, cache, [1, 2, 3])
    compute(pool, cache, [1, 2, 3])
    assert cache.lookup(make_request([1, 2, 3])).pages == [older.pages[0][:1]]
    assert pool.num_kept == 1


def test_prefix_cache_registers_only_computed_and_read_tokens():
    pool, cache = make_cache()
    request = make_request([1, 2, 3])
    request.pages, request.num_computed = [pool.allocate(2) or []], 4
    request.num_in_flight = 1  # the fourth token is computed but the host cannot name it
    cache.register(request)
    assert request.num_registered == 1
    request.num_in_flight = 0
    request.append_token(4)
    cache.register(request)
    assert request.num_registered == 2
    assert cache.lookup(make_request([1, 2, 3, 4, 5])).num_tokens == 4


def test_prefix_cache_finds_pages_after_they_are_freed_until_they_are_handed_out():
    pool, cache = make_cache(num_pages=4)
    request = compute(pool, cache, [1, 2, 3, 4, 5, 6])
    pool.free(reversed(request.pages[0]))
    asking = make_request([1, 2, 3, 4, 5, 6, 7])
    assert cache.lookup(asking).num_tokens == 6
    pool.allocate(1)
    cache.audit()
    assert cache.lookup(asking).num_tokens == 4  # the tail went first
    pool.allocate(2)
    cache.audit()
    assert cache.lookup(asking).num_tokens == 0


def test_prefix_cache_claim_takes_references_and_counts():
    pool, cache = make_cache()
    owner = compute(pool, cache, [1, 2, 3, 4])
    request = make_request([1, 2, 3, 4, 5, 6, 7])
    cache.claim(request, cache.lookup(request))
    assert [pool.num_owners(page) for page in owner.pages[0]] == [2, 2]
    assert (cache.num_queried_tokens, cache.num_hit_tokens) == (7, 4)


def test_prefix_cache_does_not_count_a_recomputed_request():
    pool, cache = make_cache()
    compute(pool, cache, [1, 2, 3, 4])
    request = make_request([1, 2, 3, 4, 5])
    request.num_preemptions = 1
    cache.claim(request, cache.lookup(request))
    assert (cache.num_queried_tokens, cache.num_hit_tokens) == (0, 0)


# Twelve tokens are six pages, a request of thirteen asks for them. A query at position 12 that sees
# 4 keys needs pages 4 and 5; at 10, pages 3 and 4; at 8, pages 2 and 3.
@pytest.mark.parametrize(
    ("windows", "missing", "num_tokens", "first_pages"),
    [
        ((4,), [], 12, [4]),
        ((4,), [0, 1, 2, 3], 12, [4]),
        ((4,), [4], 8, [2]),
        ((4,), [0, 3, 5], 6, [1]),
        ((4,), [0, 2, 4], 0, [0]),  # nowhere two pages in a row
        ((1,), [0, 1, 2, 3, 4, 5], 12, [6]),
        ((1000,), [3], 6, [0]),
        ((None, 4), [], 12, [0, 4]),
        ((4, None), [4], 8, [2, 0]),
    ],
)
def test_prefix_cache_windows_need_only_what_a_query_can_see(
    windows: tuple[int | None, ...],
    missing: list[int],
    num_tokens: int,
    first_pages: list[int],
):
    pool, cache = make_cache(windows)
    tokens = list(range(1, 13))
    owner = make_request(tokens)
    owner.pages = [pool.allocate(6) or [] for _ in windows]
    windowed = next(group for group, window in enumerate(windows) if window is not None)
    complete = [list(table) for table in owner.pages]
    for page in missing:
        owner.pages[windowed][page] = 0
    owner.num_computed = len(tokens)
    cache.register(owner)
    hit = cache.lookup(make_request([*tokens, 13]))
    assert hit.num_tokens == num_tokens
    num_pages = num_tokens // PAGE_SIZE
    for table, whole, first in zip(hit.pages, complete, first_pages, strict=True):
        assert table == [0] * first + whole[first:num_pages]


def test_prefix_cache_forget_hides_the_pages_of_one_request():
    pool, cache = make_cache((None, 4))
    bad, good = compute(pool, cache, [1, 2, 3, 4]), compute(pool, cache, [5, 6, 7, 8])
    cache.forget(bad)
    cache.audit()
    assert cache.lookup(make_request([1, 2, 3, 4, 5])).num_tokens == 0
    assert cache.lookup(make_request([*good.prompt_token_ids, 9])).num_tokens == 4


def test_prefix_cache_clear_forgets_everything():
    pool, cache = make_cache((None, 4))
    compute(pool, cache, [1, 2, 3, 4])
    cache.clear()
    cache.audit()
    pool.audit()
    assert pool.num_kept == 0
    assert cache.lookup(make_request([1, 2, 3, 4, 5])).num_tokens == 0


def test_prefix_cache_hashes_a_page_once(monkeypatch: pytest.MonkeyPatch):
    _, cache = make_cache()
    request = make_request(range(9))
    num_hashed = 0
    keyed_hash = cache._keyed_hash

    def counting(encoded: bytes, **person: bytes) -> bytes:
        nonlocal num_hashed
        num_hashed += not person
        return keyed_hash(encoded, **person)

    monkeypatch.setattr(cache, "_keyed_hash", counting)
    cache._page_hash(request, 3)
    cache._page_hash(request, 3)
    assert num_hashed == 4


@pytest.mark.parametrize("corrupt", ["index", "inverse", "mark"])
def test_prefix_cache_audit_finds_corruption(corrupt: str):
    pool, cache = make_cache()
    request = compute(pool, cache, [1, 2, 3, 4])
    if corrupt == "index":
        cache._page_by_hash[0].popitem()
    elif corrupt == "inverse":
        cache._place_by_page[request.pages[0][0]] = (0, b"other")
    else:
        pool.forget(request.pages[0][0])
    with pytest.raises(AssertionError):
        cache.audit()


# What the scheduler does with the cache; a page is four tokens here.


def make_scheduler(**changes: Any) -> Scheduler:
    config = SchedulerConfig(
        page_size=4,
        num_pages=101,
        num_slots=4,
        max_num_batched_tokens=32,
        max_model_len=64,
        windows=(None,),
        enable_prefix_caching=True,
        secret=b"secret",
    )
    return Scheduler(dataclasses.replace(config, **changes))


def add(
    scheduler: Scheduler,
    arrival: int,
    token_ids: Iterable[int],
    *,
    max_tokens: int = 8,
    prompt_logprobs: int | None = None,
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
    request = Request(f"r{arrival}", list(token_ids), params, arrival)
    scheduler.add(request)
    return request


def step(scheduler: Scheduler) -> list[str]:
    """One step whose tokens are read at once; `r0[3:5]` computed tokens 3 and 4 of request r0."""
    chunks = scheduler.schedule(0.0).chunks
    for chunk in chunks:
        if chunk.samples:
            scheduler.on_token(chunk.request, 7)
    scheduler.audit()
    return [f"{c.request.request_id}[{c.first}:{c.first + c.count}]" for c in chunks]


def test_scheduler_serves_a_prefix_from_the_step_before():
    scheduler = make_scheduler()
    first = add(scheduler, 0, range(9))
    add(scheduler, 1, range(9))
    assert step(scheduler) == ["r0[0:9]", "r1[0:9]"]  # in the same step each computes its own
    third = add(scheduler, 2, [*range(8), 50, 51])
    assert "r2[8:10]" in step(scheduler)
    assert third.num_cached == 8
    assert third.pages[0][:2] == first.pages[0][:2]


def test_scheduler_serves_output_tokens_from_the_prefix_cache():
    scheduler = make_scheduler()
    request = add(scheduler, 0, range(5), max_tokens=4)
    while request.num_output < 4:
        step(scheduler)
    scheduler.finish(request, FinishReason.LENGTH)
    add(scheduler, 1, request.token_ids(0, 9))
    assert step(scheduler) == ["r1[8:9]"]


def test_scheduler_without_prefix_caching_computes_everything():
    scheduler = make_scheduler(enable_prefix_caching=False)
    for arrival in range(2):
        request = add(scheduler, arrival, range(9))
        assert step(scheduler) == [f"r{arrival}[0:9]"]
        scheduler.finish(request, FinishReason.ABORT)


def test_scheduler_prompt_logprobs_do_not_read_the_prefix_cache_but_fill_it():
    scheduler = make_scheduler()
    for arrival, prompt_logprobs, first in [(0, 1, 0), (1, 1, 0), (2, None, 8)]:
        request = add(scheduler, arrival, range(9), prompt_logprobs=prompt_logprobs)
        assert step(scheduler) == [f"r{arrival}[{first}:9]"]
        scheduler.finish(request, FinishReason.ABORT)


def test_scheduler_counts_shared_pages_as_room():
    scheduler = make_scheduler(num_pages=6)
    add(scheduler, 0, range(12), max_tokens=1)
    step(scheduler)
    add(scheduler, 1, range(13), max_tokens=2)  # 4 pages, 3 of them shared, 2 free
    assert step(scheduler) == ["r1[12:13]"]


def test_scheduler_does_not_count_idle_cached_pages_twice():
    scheduler = make_scheduler(num_pages=9)
    first = add(scheduler, 0, range(16), max_tokens=1)
    step(scheduler)
    scheduler.finish(first, FinishReason.LENGTH)
    add(scheduler, 1, range(100, 112), max_tokens=5)  # 3 of the 4 blank pages
    step(scheduler)
    add(scheduler, 2, [*range(16), 50, 51], max_tokens=5)  # 4 idle pages and 2 more, 1 is blank
    assert step(scheduler) == ["r1[12:13]"]


def test_scheduler_num_cached_is_of_the_first_admission():
    scheduler = make_scheduler(num_pages=6)
    first = add(scheduler, 0, range(8), max_tokens=12)
    second = add(scheduler, 1, range(100, 104), max_tokens=12)
    while second.num_preemptions == 0:
        step(scheduler)
    scheduler.finish(first, FinishReason.LENGTH)
    assert step(scheduler) == [f"r1[4:{second.num_known - 1}]"]
    assert second.num_cached == 0
    assert scheduler.prefix_cache is not None
    assert scheduler.prefix_cache.num_queried_tokens == 12


def test_scheduler_error_takes_the_pages_out_of_the_prefix_cache():
    scheduler = make_scheduler()
    request = add(scheduler, 0, range(9))
    step(scheduler)
    scheduler.finish(request, FinishReason.ERROR)
    scheduler.audit()
    add(scheduler, 1, range(9))
    assert step(scheduler) == ["r1[0:9]"]


def test_scheduler_frees_tail_pages_first_across_groups():
    scheduler = make_scheduler(windows=(None, 64), num_pages=7)
    request = add(scheduler, 0, range(12), max_tokens=1)
    step(scheduler)
    scheduler.finish(request, FinishReason.LENGTH)
    scheduler.pool.allocate(2)
    assert scheduler.prefix_cache is not None
    assert scheduler.prefix_cache.lookup(make_request(range(13))).num_tokens == 8
