"""What goes into the core and what comes out of it: plain records, so that whoever only talks to a
core in another process need not load JAX.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .request import FinishReason
from .sampling_params import SamplingParams


@dataclass(frozen=True)
class Submission:
    """A request at token level. params.max_tokens is resolved; seed is drawn by the caller if none
    was given. output_token_ids: what an earlier engine made of the request, which goes on after
    them as if nothing had happened. tenant: whose share of a fair engine it takes. submitted_ns: by
    time.monotonic_ns(), where its wait begins.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    bad_words: tuple[tuple[int, ...], ...] = ()
    choice: int = 0
    priority: int = 0
    cache_salt: bytes = b""
    output_token_ids: tuple[int, ...] = ()
    tenant: bytes = b""
    submitted_ns: int = field(default_factory=time.monotonic_ns, compare=False)


@dataclass(frozen=True)
class PositionLogprobs:
    """Logprobs at one position: of the token itself, its rank from 1, and the most likely ones."""

    token_id: int
    logprob: float
    rank: int
    top_ids: np.ndarray  # i32[k], by falling logprob; in order of id when all were asked for
    top: np.ndarray  # f32[k]


@dataclass(slots=True)
class StepOutput:
    """What one step, or a failure, brought one request. Not to be changed; a frozen dataclass takes
    five times as long to make.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    prompt_logprobs: Sequence[PositionLogprobs] | None = None  # with the first token
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached: int = 0  # with the first token, and with an end that has none
    queue_ns: int = 0  # from submission to admission, with the first token
