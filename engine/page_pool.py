"""Who owns a page: reference counts and the order in which free pages are handed out.

Knows nothing of tokens, hashes or groups. Page 0 is the null page: never handed out, so that padded
reads have a page that nobody writes.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class PagePool:
    """Pages 1 .. num_pages-1, each owned by any number of requests or free.

    A page whose content is worth finding again is *kept*: once free it waits, least recently used
    first out, until no blank page is left. Every operation is O(1) a page.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"a pool needs the null page and one more, got num_pages={num_pages}")
        self.num_pages = num_pages
        self.num_evicted = 0
        self.on_evict: Callable[[int], None] | None = None  # a kept page is about to be handed out
        self._num_owners = [0] * num_pages
        self._kept: set[int] = set()
        # The free queue in two halves: blank pages go first, so that kept content lives longest.
        self._blank = list(range(num_pages - 1, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_usable(self) -> int:
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages without an owner; those that still hold kept content included."""
        return len(self._blank) + len(self._idle)

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def num_owners(self, page: int) -> int:
        return self._num_owners[page]

    def is_kept(self, page: int) -> bool:
        return page in self._kept

    def allocate(self, num_pages: int) -> list[int] | None:
        """Pages with one owner each, or None and nothing changed if there are not enough."""
        if num_pages > self.num_free:
            return None
        pages = []
        for _ in range(num_pages):
            page = self._blank.pop() if self._blank else self._evict()
            self._num_owners[page] = 1
            pages.append(page)
        return pages

    def share(self, page: int) -> None:
        """Give an owned or idle page one more owner."""
        if self._num_owners[page] == 0:
            if page not in self._idle:
                raise ValueError(f"page {page} cannot be shared: it has no owner and no content")
            del self._idle[page]
        self._num_owners[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Take one owner from each. Pass tail pages first: the first in is the first evicted."""
        for page in pages:
            if self._num_owners[page] == 0:
                raise ValueError(f"page {page} cannot be freed: it has no owner")
            self._num_owners[page] -= 1
            if self._num_owners[page]:
                continue
            if page in self._kept:
                self._idle[page] = None
            else:
                self._blank.append(page)

    def keep(self, page: int) -> None:
        """Mark the content of an owned page as worth finding again."""
        if self._num_owners[page] == 0:
            raise ValueError(f"page {page} cannot be kept: it has no owner")
        self._kept.add(page)

    def forget(self, page: int) -> None:
        """The content of a kept page is not worth finding any more; its owners stay."""
        self._kept.remove(page)
        if page in self._idle:
            del self._idle[page]
            self._blank.append(page)

    def forget_all(self) -> None:
        """`forget` for every kept page."""
        self._kept.clear()
        self._blank.extend(self._idle)
        self._idle.clear()

    def audit(self) -> None:
        """Assert the invariants; O(num_pages), for tests and idle moments."""
        blank = set(self._blank)
        free = {page for page in range(1, self.num_pages) if self._num_owners[page] == 0}
        assert len(blank) == len(self._blank), "a page is twice in the free queue"
        assert self._num_owners[0] == 0, "the null page has an owner"
        assert min(self._num_owners) >= 0, "a page has fewer than no owners"
        assert blank | self._idle.keys() == free, "the free queue is not the pages without owner"
        assert self._idle.keys() <= self._kept, "an idle page holds nothing worth keeping"
        assert not blank & self._kept, "a blank page is marked as kept"

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self._kept.remove(page)
        self.num_evicted += 1
        if self.on_evict is not None:
            self.on_evict(page)
        return page


def pages_held(
    num_tokens: int, windows: Sequence[int | None], page_size: int, max_chunk: int
) -> int:
    """The most pages, over all groups, that one request of so many tokens holds at once."""
    total = 0
    for window in windows:
        num_pages = -(-num_tokens // page_size)
        if window is not None:
            # A chunk and the keys its first query sees are this many tokens, at worst placed so
            # that the first of them is the last of its page.
            span = window - 1 + max_chunk
            num_pages = min(num_pages, (span + page_size - 2) // page_size + 1)
        total += num_pages
    return total
