"""The invariants of queues, slots and pages."""

from typing import TYPE_CHECKING

from .prefix_cache import first_visible_page
from .request import Request

if TYPE_CHECKING:
    from .scheduler import Scheduler


def audit(scheduler: "Scheduler") -> None:
    """Raise AssertionError for the first invariant that does not hold."""
    scheduler.pool.audit()
    if scheduler.prefix_cache is not None:
        scheduler.prefix_cache.audit()
    for queue in (scheduler.running, scheduler.waiting):
        assert list(queue) == sorted(queue, key=scheduler.config.policy), "a queue is out of order"
    slots = [request.slot for request in scheduler.running] + list(scheduler.free_slots)
    assert set(slots) == set(range(scheduler.config.num_slots)), "a slot is lost"
    assert len(slots) == scheduler.config.num_slots, "a slot has two owners"
    num_owners = [0] * scheduler.config.num_pages
    for request in scheduler.running:
        _audit_pages(scheduler, request)
        for page in (page for table in request.pages for page in table if page):
            num_owners[page] += 1
    for page, num in enumerate(num_owners):
        assert scheduler.pool.num_owners(page) == num, (
            f"page {page} is not held as often as counted"
        )
    for request in scheduler.waiting:
        assert not request.pages, f"{request!r} holds pages"
        assert request.num_computed == 0, f"{request!r} has computed tokens and no pages"
    for request in (*scheduler.running, *scheduler.waiting):
        assert request.finish_reason is None, f"{request!r} is queued"
        assert request.num_computed < request.num_known, f"{request!r} is ahead of itself"
        assert request.num_in_flight >= 0, f"{request!r} has a token less than none in flight"


def _audit_pages(scheduler: "Scheduler", request: Request) -> None:
    page_size = scheduler.config.page_size
    num_pages = -(-request.num_computed // page_size)
    for table, window in zip(request.pages, scheduler.config.windows, strict=True):
        first = first_visible_page(request.num_computed, window, page_size)
        assert len(table) == num_pages, f"{request!r}: the page table has the wrong length"
        assert all(table[first:]), f"{request!r}: a page that a query can see is missing"
        held = [page for page in table if page]
        assert len(set(held)) == len(held), f"{request!r} holds a page twice"
