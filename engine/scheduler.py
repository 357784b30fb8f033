"""Who runs this step, and how many tokens each.

There is no prefill phase and no decode phase: each request has computed tokens catching up with its
known tokens, and a step gives each scheduled request some of the token budget. Pure host logic:
knows no device and no clock. Device programs run in the order of the plans, so a token counts as
computed, and a freed page as free, from the moment it is planned.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice

from .audit import audit
from .errors import ConfigError, RequestError
from .page_pool import PagePool, pages_held
from .policies import Policy, StartTags, fcfs
from .prefix_cache import PrefixCache, PrefixHit, first_visible_page
from .request import FinishReason, Request
from .step_plan import Chunk, StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What bounds a step."""

    page_size: int  # tokens a page
    num_pages: int  # one pool over all KV groups, the null page included
    num_slots: int  # requests that run at once
    max_num_batched_tokens: int  # tokens a step
    max_model_len: int  # prompt and output of one request
    windows: tuple[int | None, ...]  # per KV group, keys that a query sees; None is all
    enable_prefix_caching: bool
    secret: bytes  # key of the page hashes
    max_chunk: int | None = None  # tokens of one request in one step
    policy: Policy = fcfs
    fill: Callable[[int], int] = lambda wanted: wanted  # tokens to compute of those there are

    def __post_init__(self) -> None:
        names = ("page_size", "num_slots", "max_num_batched_tokens", "max_model_len", "max_chunk")
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not self.windows or any(window is not None and window < 1 for window in self.windows):
            raise ConfigError(f"windows needs a positive size or None a group, got {self.windows}")


@dataclass(slots=True)
class _Draft:
    """A plan in the making."""

    budget: int
    num_promised: int = 0  # pages that requests in the middle of their prompt will still take
    singles: list[Chunk] = field(default_factory=list)
    longer: list[Chunk] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)


class Scheduler:
    """The queues, and the owner of every page and slot that a request holds."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = PagePool(config.num_pages)
        self.prefix_cache = (
            PrefixCache(self.pool, config.page_size, config.windows, config.secret)
            if config.enable_prefix_caching
            else None
        )
        self.num_preemptions = 0
        self._start_tags = StartTags()
        self._running: list[Request] = []  # both queues are in policy order
        self._waiting: list[Request] = []
        self._free_slots = list(range(config.num_slots - 1, -1, -1))
        self._max_count = min(
            config.max_num_batched_tokens, config.max_chunk or config.max_num_batched_tokens
        )

    @property
    def running(self) -> Sequence[Request]:
        """In policy order; a view, not to be changed."""
        return self._running

    @property
    def waiting(self) -> Sequence[Request]:
        """In policy order, preempted requests among them; a view, not to be changed."""
        return self._waiting

    @property
    def free_slots(self) -> Sequence[int]:
        return self._free_slots

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def pages_for(self, num_tokens: int) -> int:
        """The most pages, over all groups, that one request of so many tokens holds at once."""
        c = self.config
        return pages_held(num_tokens, c.windows, c.page_size, self._max_count)

    def can_ever_fit(self, request: Request) -> bool:
        """Whether the request, when alone, can run to its longest end; the last token has no KV."""
        return self.pages_for(self._max_known(request) - 1) <= self.pool.num_usable

    def add(self, request: Request) -> None:
        """Queue a request, which may already have output. Refuses one that could never end."""
        name, max_known = f"request {request.request_id!r}", self._max_known(request)
        if request.num_prompt == 0:
            raise RequestError(f"{name} has an empty prompt; send at least one token")
        if request.num_known >= max_known:
            raise RequestError(
                f"{name} has {request.num_known} tokens and may have {max_known}: there is none to "
                "sample; shorten the prompt or raise max_tokens"
            )
        if not self.can_ever_fit(request):
            raise RequestError(
                f"{name} may need {self.pages_for(max_known - 1)} KV pages and there are "
                f"{self.pool.num_usable}; shorten the prompt, lower max_tokens or give the KV "
                "cache more memory"
            )
        self._start_tags.on_added(request, max_known)
        insort(self._waiting, request, key=self.config.policy)

    def schedule(self, now: float, *, most_steps: int = 1) -> StepPlan:
        """Plan the next step and count it as done. now: seconds; no policy reads it yet.

        most_steps: how many steps rows of one token may go on by themselves when nobody waits.
        """
        budget = self._budget()
        draft = _Draft(budget=budget)
        self._plan_running(draft)
        if not draft.preempted:
            self._plan_waiting(draft)
        if not self._waiting:
            self._start_tags.on_nobody_waits()
            self._plan_more_steps(draft, most_steps)
        chunks = (*draft.singles, *draft.longer)
        if self.prefix_cache is not None:
            # Only now: within one step a page is not written before another request reads it.
            for chunk in chunks:
                self.prefix_cache.register(chunk.request)
        return StepPlan(
            chunks=chunks,
            admitted=tuple(draft.admitted),
            preempted=tuple(draft.preempted),
            num_tokens=budget - draft.budget,
        )

    def on_token(self, request: Request, token_id: int) -> None:
        """Take a sampled token that the host has read. The caller drops those of ended requests."""
        if request.finish_reason is not None or request.num_in_flight == 0:
            raise RuntimeError(f"no token is in flight for {request!r}")
        request.num_in_flight -= 1
        request.append_token(token_id)
        if self.prefix_cache is not None:
            self.prefix_cache.register(request)

    def finish(
        self, request: Request, reason: FinishReason, stop_reason: int | str | None = None
    ) -> None:
        """End a request, waiting or running. Tokens of it still in flight are to be dropped."""
        if request.finish_reason is not None:
            raise RuntimeError(f"{request!r} has already finished: {request.finish_reason}")
        self._remove(self._waiting if request.slot is None else self._running, request)
        self._start_tags.on_ended(request, self._max_known(request))
        if reason is FinishReason.ERROR and self.prefix_cache is not None:
            # Its KV may hold the NaN that ended it, which would end whoever shares the prefix.
            self.prefix_cache.forget(request)
        self._release(request)
        request.num_in_flight = 0
        request.finish_reason = reason
        request.stop_reason = stop_reason

    def recompute_all(self) -> list[Request]:
        """Start over after a failed step: the KV and every token in flight are lost.

        Returns the requests that were running; which of them have failed too often is the caller's.
        """
        lost = self._running[::-1]
        for request in lost:
            self._send_back(request)
        for request in self._waiting:
            request.num_in_flight = 0
        if self.prefix_cache is not None:
            self.prefix_cache.clear()
        return lost[::-1]

    def audit(self) -> None:
        """Assert every invariant of queues, slots and pages; for tests and idle moments."""
        audit(self)

    def _max_known(self, request: Request) -> int:
        return min(request.num_prompt + request.max_tokens, self.config.max_model_len)

    def _num_ready(self, request: Request) -> int:
        """Tokens to compute next; 0 once nothing is left to sample, only the last token to read."""
        num_known = request.num_known
        if num_known >= self._max_known(request):
            return 0
        return min(num_known - request.num_computed, self._max_count)

    def _budget(self) -> int:
        """Tokens of the next step: a full one, or what fills its program well."""
        most, wanted = self.config.max_num_batched_tokens, 0
        for request in chain(self._running, islice(self._waiting, len(self._free_slots))):
            wanted += self._num_ready(request)
            if wanted >= most:
                return most
        budget, num_running = self.config.fill(wanted), len(self._running)
        # At least half of what is not one token of a running request: prompts must not starve.
        is_much = 2 * (budget - num_running) >= wanted - num_running
        return budget if is_much and budget < wanted else most

    def _plan_running(self, draft: _Draft) -> None:
        """In order, but a prompt leaves those behind it that need one token each theirs."""
        index, least = 0, 1  # the first prompt always gets on, or it could wait for ever
        num_singles_behind: int | None = None  # counted once a prompt is met
        # Preemption shortens the queue from behind, never at or before a request already planned.
        while draft.budget and index < len(self._running):
            request = self._running[index]
            count = self._num_ready(request)
            index += 1
            if count > 1:
                if num_singles_behind is None:
                    behind = islice(self._running, index, None)
                    num_singles_behind = sum(self._num_ready(other) == 1 for other in behind)
                count = min(count, max(draft.budget - num_singles_behind, least))
                least = 0
            elif num_singles_behind is not None:
                num_singles_behind -= count
            if count and self._make_room(request, count, draft):
                self._plan_chunk(request, count, draft)

    def _plan_waiting(self, draft: _Draft) -> None:
        while draft.budget and self._waiting and self._free_slots:
            request = self._waiting[0]
            # Preempted, its last token unread: the host cannot yet write what it must recompute.
            if request.num_in_flight:
                return
            hit = self._lookup(request)
            pages = (page for table in hit.pages for page in table if page)
            num_idle = sum(not self.pool.num_owners(page) for page in pages)
            num_wanted = num_idle + self._num_missing(request, hit.pages) + draft.num_promised
            if num_wanted > self.pool.num_free:
                return
            self._admit(request, hit)
            draft.admitted.append(request)
            count = min(self._num_ready(request), draft.budget)
            has_grown = self._grow(request, count)
            assert has_grown, f"{request!r} was admitted without room for its pages"
            self._plan_chunk(request, count, draft)

    def _plan_chunk(self, request: Request, count: int, draft: _Draft) -> None:
        first = request.num_computed
        end = first + count
        samples = end == request.num_known
        assert request.slot is not None
        chunk = Chunk(request, request.slot, first, count, samples)
        (draft.singles if count == 1 else draft.longer).append(chunk)
        draft.budget -= count
        request.num_computed = end
        if samples:
            request.num_in_flight += 1
        else:
            draft.num_promised += self._num_missing(request, request.pages)

    def _plan_more_steps(self, draft: _Draft, most_steps: int) -> None:
        """Let decoding rows go on for as long as their pages and what they may sample last."""
        if most_steps == 1 or draft.longer or not all(chunk.samples for chunk in draft.singles):
            return
        for index, chunk in enumerate(draft.singles):
            request = chunk.request
            more = min(most_steps - 1, self._max_known(request) - request.num_known)
            if more and not self._take_pages(request, more):
                held = len(request.pages[0]) * self.config.page_size
                more = min(more, held - request.num_computed)
            request.num_computed += more
            request.num_in_flight += more
            draft.singles[index] = replace(chunk, num_steps=1 + more)

    def _num_missing(self, request: Request, pages: list[list[int]]) -> int:
        """Pages that a request with these may still take to compute what is known and a page more.

        The page more is what keeps a fresh request from being preempted at once.
        """
        num_tokens = request.num_known + self.config.page_size
        num_held = sum(len(table) - table.count(0) for table in pages)
        return self.pages_for(min(num_tokens, self._max_known(request) - 1)) - num_held

    def _lookup(self, request: Request) -> PrefixHit:
        # Prompt logprobs need the hidden rows of the whole prompt, which only computing it gives.
        if self.prefix_cache is None or request.params.prompt_logprobs is not None:
            return PrefixHit(0, [[] for _ in self.config.windows])
        return self.prefix_cache.lookup(request)

    def _admit(self, request: Request, hit: PrefixHit) -> None:
        del self._waiting[0]
        if self.prefix_cache is not None:
            self.prefix_cache.claim(request, hit)
        if request.num_preemptions == 0:
            request.num_cached = min(hit.num_tokens, request.num_prompt)
        request.slot = self._free_slots.pop()
        request.pages = hit.pages
        request.num_computed = hit.num_tokens
        request.num_registered = hit.num_tokens // self.config.page_size
        self._start_tags.on_admitted(request)
        insort(self._running, request, key=self.config.policy)

    def _make_room(self, request: Request, count: int, draft: _Draft) -> bool:
        """Grow, preempting the newest while pages are short; False if that was the request."""
        while not self._grow(request, count):
            newest = self._running[-1]
            self._send_back(newest)
            self.num_preemptions += 1
            draft.preempted.append(newest)
            if newest is request:
                return False
        return True

    def _grow(self, request: Request, count: int) -> bool:
        """Own the pages of the next `count` tokens: of every group, or none more and False."""
        if self._num_new_pages(request, count) > 0:
            self._free_below_windows(request)
        return self._take_pages(request, count)

    def _num_new_pages(self, request: Request, count: int) -> int:
        """Of each group, for its next `count` tokens."""
        num_computed, page_size = request.num_computed, self.config.page_size
        return -(-(num_computed + count) // page_size) - len(request.pages[0])

    def _take_pages(self, request: Request, count: int) -> bool:
        """Like _grow, and what a window has left is kept: the step being planned may yet read
        it.
        """
        num_pages = self._num_new_pages(request, count)
        if num_pages <= 0:
            return True
        pages = self.pool.allocate(num_pages * len(request.pages))
        if pages is None:
            return False
        for group, table in enumerate(request.pages):
            table += pages[group * num_pages : (group + 1) * num_pages]
        return True

    def _free_below_windows(self, request: Request) -> None:
        for table, window in zip(request.pages, self.config.windows, strict=True):
            index = first_visible_page(request.num_computed, window, self.config.page_size)
            freed = []
            # Backwards, tail first, down to where an earlier call began.
            while index > 0 and table[index - 1]:
                index -= 1
                freed.append(table[index])
                table[index] = 0
            self.pool.free(freed)

    def _send_back(self, request: Request) -> None:
        """Take a running request's slot and pages; it waits to be recomputed, its place kept."""
        self._remove(self._running, request)
        self._release(request)
        request.num_preemptions += 1
        insort(self._waiting, request, key=self.config.policy)

    def _release(self, request: Request) -> None:
        # Tail pages first: when memory is short, the shared prefix is evicted last.
        for column in zip(*map(reversed, request.pages), strict=True):
            self.pool.free(page for page in column if page)
        request.pages = []
        request.num_computed = 0
        if request.slot is not None:
            self._free_slots.append(request.slot)
            request.slot = None

    def _remove(self, queue: list[Request], request: Request) -> None:
        policy = self.config.policy
        for index in range(bisect_left(queue, policy(request), key=policy), len(queue)):
            if queue[index] is request:
                del queue[index]
                return
        raise RuntimeError(f"{request!r} is not queued here")
