"""Which page holds which tokens: an index from chained page hashes to pages, per KV group.

A hash stands for a page's tokens and everything before them, so that equal hashes mean equal KV. It
is keyed: without the secret nobody can craft tokens that collide with another tenant's. Owners and
the order of eviction are the pool's; which requests may read is the scheduler's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from struct import Struct

from .page_pool import PagePool
from .request import Request

HASH_BYTES = 16


def first_visible_page(position: int, window: int | None, page_size: int) -> int:
    """The first logical page that a query at `position` or later can see.

    A query at p sees the keys p-window+1 .. p, or all keys up to p where window is None.
    """
    return 0 if window is None else max(0, position - window + 1) // page_size


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The longest cached prefix of a request; `pages` is per group, 0 below the group's window."""

    num_tokens: int
    pages: list[list[int]]


class PrefixCache:
    """Finds and remembers full pages. A page found here is never written again."""

    def __init__(
        self, pool: PagePool, page_size: int, windows: Sequence[int | None], secret: bytes
    ) -> None:
        """secret: at most 64 bytes, the same in every process that shares hashes."""
        self.page_size = page_size
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._pool = pool
        self._windows = tuple(windows)
        self._secret = secret
        self._pack_page = Struct(f"<{page_size}i").pack
        self._page_by_hash: list[dict[bytes, int]] = [{} for _ in windows]
        self._place_by_page: dict[int, tuple[int, bytes]] = {}  # page -> (group, hash)
        pool.on_evict = self._drop_entry

    def lookup(self, request: Request) -> PrefixHit:
        """The longest usable prefix: full pages that leave at least the last token to compute.

        Usable means that every group has each page which a query after the prefix can still see.
        Takes no reference: `claim` does. One pass over the pages, whatever the windows.
        """
        num_pages = 0
        run_lengths = [0] * len(self._windows)  # cached pages in a row, per group
        for index in range((request.num_tokens - 1) // self.page_size):
            page_hash = self._page_hash(request, index)
            is_usable = True
            for group, window in enumerate(self._windows):
                is_cached = page_hash in self._page_by_hash[group]
                run_lengths[group] = run_lengths[group] + 1 if is_cached else 0
                if not is_cached and window is None:
                    return self._hit(request, num_pages)
                first = first_visible_page((index + 1) * self.page_size, window, self.page_size)
                is_usable &= run_lengths[group] > index - first
            if is_usable:
                num_pages = index + 1
        return self._hit(request, num_pages)

    def claim(self, request: Request, hit: PrefixHit) -> None:
        """Take one reference for `request` on each page of its hit."""
        for table in hit.pages:
            for page in filter(None, table):
                self._pool.share(page)
        if request.num_preemptions == 0:  # finding its own pages again says nothing of the cache
            self.num_queried_tokens += request.num_tokens
            self.num_hit_tokens += hit.num_tokens

    def register(self, request: Request) -> None:
        """Index the pages of `request` that became full of computed, host-known tokens."""
        num_full = min(request.num_computed, request.num_tokens) // self.page_size
        if num_full <= request.num_registered:
            return
        for index in range(request.num_registered, num_full):
            page_hash = self._page_hash(request, index)
            for group, page_by_hash in enumerate(self._page_by_hash):
                page = request.pages[group][index]
                # An equal page that is already there has the older owners: keep it.
                if page and page_hash not in page_by_hash:
                    page_by_hash[page_hash] = page
                    self._place_by_page[page] = (group, page_hash)
                    self._pool.keep(page)
        request.num_registered = num_full

    def forget(self, request: Request) -> None:
        """Drop the pages that `request` holds: their content is in doubt."""
        for page in (page for table in request.pages for page in table):
            if page in self._place_by_page:
                self._drop_entry(page)
                self._pool.forget(page)

    def clear(self) -> None:
        """Forget every page: their content is lost."""
        for page_by_hash in self._page_by_hash:
            page_by_hash.clear()
        self._place_by_page.clear()
        self._pool.forget_all()

    def audit(self) -> None:
        """Assert that the index, its inverse and the pool's marks agree."""
        for group, page_by_hash in enumerate(self._page_by_hash):
            for page_hash, page in page_by_hash.items():
                assert self._place_by_page[page] == (group, page_hash), f"page {page} misplaced"
                assert self._pool.is_kept(page), f"page {page} is indexed but not kept"
        num_indexed = sum(map(len, self._page_by_hash))
        assert num_indexed == len(self._place_by_page) == self._pool.num_kept, "stale entries"

    def _hit(self, request: Request, num_pages: int) -> PrefixHit:
        num_tokens = num_pages * self.page_size
        pages = []
        for page_by_hash, window in zip(self._page_by_hash, self._windows, strict=True):
            first = min(first_visible_page(num_tokens, window, self.page_size), num_pages)
            hashes = request.page_hashes[first:num_pages]
            pages.append([0] * first + [page_by_hash[page_hash] for page_hash in hashes])
        return PrefixHit(num_tokens, pages)

    def _page_hash(self, request: Request, index: int) -> bytes:
        """Hash of logical page `index`, each page hashed once in a request's life."""
        hashes = request.page_hashes
        while len(hashes) <= index:
            parent = hashes[-1] if hashes else self._root_hash(request.root_parts)
            tokens = request.token_ids(len(hashes) * self.page_size, self.page_size)
            hashes.append(self._keyed_hash(parent + self._pack_page(*tokens)))
        return hashes[index]

    def _root_hash(self, parts: tuple[bytes, ...]) -> bytes:
        # Length-prefixed, for ("ab", "c") and ("a", "bc") are two tenants.
        encoded = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        return self._keyed_hash(encoded, person=b"quire root")

    def _keyed_hash(self, encoded: bytes, *, person: bytes = b"quire page") -> bytes:
        return blake2b(encoded, digest_size=HASH_BYTES, key=self._secret, person=person).digest()

    def _drop_entry(self, page: int) -> None:
        group, page_hash = self._place_by_page.pop(page)
        del self._page_by_hash[group][page_hash]
