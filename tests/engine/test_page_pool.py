import pytest
from quire.engine.page_pool import PagePool


def keep_and_free(pool: PagePool, num_pages: int) -> list[int]:
    """Pages that were filled with content worth keeping and freed in the order returned."""
    pages = pool.allocate(num_pages)
    assert pages is not None
    for page in pages:
        pool.keep(page)
    pool.free(pages)
    return pages


def test_page_pool_never_hands_out_the_null_page():
    pool = PagePool(5)
    pages = pool.allocate(4)
    assert pages is not None
    assert sorted(pages) == [1, 2, 3, 4]
    pool.audit()


def test_page_pool_allocates_all_or_nothing():
    pool = PagePool(4)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert pool.allocate(0) == []
    pool.audit()


def test_page_pool_frees_a_page_with_its_last_owner():
    pool = PagePool(3)
    [page] = pool.allocate(1) or []
    pool.share(page)
    pool.free([page])
    assert (pool.num_owners(page), pool.num_free) == (1, 1)
    pool.free([page])
    assert (pool.num_owners(page), pool.num_free) == (0, 2)
    pool.audit()


def test_page_pool_hands_out_blank_pages_before_kept_ones():
    pool = PagePool(4)
    kept = keep_and_free(pool, 1)
    pages = pool.allocate(2) or []
    assert set(pages).isdisjoint(kept)
    assert pool.allocate(1) == kept
    assert pool.num_evicted == 1


def test_page_pool_evicts_least_recently_freed_first_and_tells():
    pool = PagePool(4)
    evicted: list[int] = []
    pool.on_evict = evicted.append
    first, second, third = keep_and_free(pool, 3)
    pool.share(first)
    pool.free([first])  # used again, so it is now the last to go
    assert pool.allocate(3) == [second, third, first]
    assert evicted == [second, third, first]
    assert pool.num_kept == 0
    pool.audit()


def test_page_pool_share_resurrects_an_idle_page():
    pool = PagePool(2)
    [page] = keep_and_free(pool, 1)
    pool.share(page)
    assert pool.num_free == 0
    assert pool.allocate(1) is None
    assert pool.is_kept(page)
    pool.audit()


@pytest.mark.parametrize("num_owners", [0, 1])
def test_page_pool_forget_makes_a_page_blank_once_free(num_owners: int):
    pool = PagePool(3)
    [page] = keep_and_free(pool, 1)
    for _ in range(num_owners):
        pool.share(page)
    pool.forget(page)
    pool.free([page] * num_owners)
    pool.audit()
    assert pool.allocate(2) is not None
    assert pool.num_evicted == 0


def test_page_pool_forget_all_leaves_owners():
    pool = PagePool(4)
    idle, owned = keep_and_free(pool, 2)
    pool.share(owned)
    pool.forget_all()
    pool.audit()
    assert (pool.num_owners(owned), pool.num_free, pool.num_kept) == (1, 2, 0)
    with pytest.raises(ValueError, match=f"page {idle} cannot be shared"):
        pool.share(idle)


def test_page_pool_refuses_a_second_free():
    pool = PagePool(3)
    pages = pool.allocate(1) or []
    pool.free(pages)
    with pytest.raises(ValueError, match="cannot be freed: it has no owner"):
        pool.free(pages)


def test_page_pool_refuses_to_free_the_null_page():
    with pytest.raises(ValueError, match="page 0 cannot be freed"):
        PagePool(3).free([0])


def test_page_pool_refuses_to_keep_a_free_page():
    with pytest.raises(ValueError, match="page 1 cannot be kept"):
        PagePool(3).keep(1)


def test_page_pool_refuses_a_size_without_usable_pages():
    with pytest.raises(ValueError, match="num_pages=1"):
        PagePool(1)


@pytest.mark.parametrize("corrupt", ["null", "twice", "lost", "kept"])
def test_page_pool_audit_finds_corruption(corrupt: str):
    pool = PagePool(4)
    [page] = pool.allocate(1) or []
    if corrupt == "null":
        pool._num_owners[0] = 1
    elif corrupt == "twice":
        pool._blank.append(pool._blank[0])
    elif corrupt == "lost":
        pool._num_owners[page] = 0
    else:
        pool._kept.add(pool._blank[0])
    with pytest.raises(AssertionError):
        pool.audit()
