"""The bounds of what waits: requests without a first token, and the tokens of their prompts."""

import time
from collections import deque
from dataclasses import dataclass

from ...engine.errors import Overloaded
from .metrics import GatewayMetrics

# How far back the rate is measured that says when to try again, and the bounds of what is said.
_RATE_WINDOW_S = 10.0
_SOONEST_S, _LATEST_S = 0.1, 60.0
_UNKNOWN_S = 1.0  # of a server that was idle until now


@dataclass(frozen=True)
class WaitingLimits:
    """Each of n answers is one request, and its prompt counts for each."""

    max_requests: int = 1024
    max_tokens: int = 1_000_000


class Place:
    """What one request takes of the bounds, until leave()."""

    def __init__(self, waiting: "Waiting", num_requests: int, num_tokens: int) -> None:
        self._waiting = waiting
        self.num_requests = num_requests
        self.num_tokens = num_tokens
        self._has_left = False

    def leave(self, *, has_started: bool = False) -> None:
        """Give it back, once; later calls do nothing."""
        if not self._has_left:
            self._has_left = True
            self._waiting._take(-self.num_requests, -self.num_tokens)
            if has_started:
                self._waiting._note_start(self.num_requests)


class Waiting:
    """Hands out places."""

    def __init__(self, limits: WaitingLimits, metrics: GatewayMetrics) -> None:
        self._limits = limits
        self._metrics = metrics
        self._starts: deque[tuple[float, int]] = deque()
        self._waiting_since = 0.0  # some request or other, without a pause

    def enter(self, num_requests: int, num_tokens: int) -> Place:
        """Raises Overloaded. Whatever a request asks for, it is let in when nobody waits."""
        self._require_room(num_requests, num_tokens)
        self._take(num_requests, num_tokens)
        return Place(self, num_requests, num_tokens)

    def correct(self, place: Place, num_tokens: int) -> None:
        """Now that the prompt is encoded. Raises Overloaded; the place is still to be left."""
        more = num_tokens - place.num_tokens
        if more > 0 and self._metrics.num_queued > place.num_requests:
            self._require_room(0, more)
        self._take(0, more)
        place.num_tokens = num_tokens

    def _require_room(self, num_requests: int, num_tokens: int) -> None:
        metrics, limits = self._metrics, self._limits
        if not metrics.num_queued:
            return
        if metrics.num_queued + num_requests > limits.max_requests:
            metrics.rejected_by_reason["max_num_queued_reqs"] += 1
            raise self._full(
                f"{metrics.num_queued} requests wait for their first token and at most "
                f"{limits.max_requests} may (max_num_queued_reqs)"
            )
        if metrics.num_queued_tokens + num_tokens > limits.max_tokens:
            metrics.rejected_by_reason["max_num_queued_tokens"] += 1
            raise self._full(
                f"the waiting prompts have {metrics.num_queued_tokens} tokens, this one about "
                f"{num_tokens}, and at most {limits.max_tokens} may wait (max_num_queued_tokens)"
            )

    def _full(self, why: str) -> Overloaded:
        retry_s = self._retry_after_s()
        return Overloaded(f"{why}; try again in {retry_s:.1f} s", retry_after_s=retry_s)

    def _retry_after_s(self) -> float:
        """The time in which a tenth of those that wait will have started, at the rate of late."""
        self._forget_old_starts()
        num_started = sum(count for _, count in self._starts)
        if not num_started:
            # The longer nothing starts, the longer it may take.
            waited_s = time.monotonic() - self._waiting_since
            return min(_RATE_WINDOW_S, max(_UNKNOWN_S, waited_s))
        wanted = self._metrics.num_queued / 10
        return min(_LATEST_S, max(_SOONEST_S, wanted * _RATE_WINDOW_S / num_started))

    def _take(self, num_requests: int, num_tokens: int) -> None:
        if not self._metrics.num_queued:
            self._waiting_since = time.monotonic()
        self._metrics.num_queued += num_requests
        self._metrics.num_queued_tokens += num_tokens

    def _note_start(self, num_requests: int) -> None:
        self._starts.append((time.monotonic(), num_requests))
        self._forget_old_starts()

    def _forget_old_starts(self) -> None:
        oldest = time.monotonic() - _RATE_WINDOW_S
        while self._starts and self._starts[0][0] < oldest:
            self._starts.popleft()
