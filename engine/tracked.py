"""What the core remembers of a request, and of a step that is on the device."""

from dataclasses import dataclass, field

import jax

from ..layers.sampling import TokenLogprobs
from .core_io import PositionLogprobs
from .request import Request
from .row_packer import RowNeeds
from .step_plan import Chunk


@dataclass
class Tracked:
    """A request and what the core remembers about it."""

    request: Request
    needs: RowNeeds
    bad_words: tuple[tuple[int, ...], ...]
    stop_ids: frozenset[int]
    submitted_ns: int
    queue_ns: int | None = None  # once admitted; 0 once told
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)


@dataclass(frozen=True)
class Scores:
    """Prompt logprobs of one request under way: `count` positions from prompt position `first`."""

    request: Request
    first: int
    count: int
    result: TokenLogprobs


@dataclass(frozen=True)
class InFlight:
    """A dispatched step whose tokens the host has not read."""

    chunks: tuple[Chunk, ...]
    tokens: jax.Array | None  # i32[2, rows], token and flag; of several steps i32[steps, 2, rows]
    logprobs: TokenLogprobs | None  # of the sampled rows
    scores: tuple[Scores, ...]


class RowFault(Exception):
    """What broke a step is one request's own."""

    def __init__(self, request: Request, error: Exception) -> None:
        super().__init__(str(error))
        self.request = request
