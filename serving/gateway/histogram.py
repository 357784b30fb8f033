"""A histogram that costs one search and two additions an observation.

Knows neither names nor labels nor formats: metrics.py makes those when somebody asks. No lock: one
thread owns it.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

# Six bounds a decade, in steps of at most 1.7: a percentile read from them is off by less.
_DECADE = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)


def _bounds(lowest_exponent: int) -> tuple[float, ...]:
    """Seconds, from a power of ten to 160."""
    decades = range(lowest_exponent, 2)
    fine = (round(m * 10.0**exponent, 6) for exponent in decades for m in _DECADE)
    return (*fine, 100.0, 160.0)


LATENCY_S = _bounds(-3)
# A token of a small model, and the queue of an idle engine, take less than a millisecond.
TOKEN_S = _bounds(-4)
NUM_TOKENS = (*(float(m * 10**exponent) for exponent in range(6) for m in (1, 2, 5)), 1e6)


class Histogram:
    """Counts by bucket. bounds: ascending, each the largest value of its bucket."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.sum = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[int]:
        """Observations up to each bound, and all of them at the end."""
        return list(accumulate(self._counts))
