"""One request: what was asked, the tokens known so far, and how far its KV has come.

A request takes no decision. The scheduler moves its counters, slot and pages; the prefix cache
keeps its page hashes here, so that a page is hashed once. Nothing here knows a device, a text or a
clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .sampling_params import SamplingParams


class FinishReason(StrEnum):
    """Why a request ended; the values are the API's strings."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RequestStatus(StrEnum):
    """Where a request stands; always derived, never stored."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """The identity and inputs of a request, which never change, and its progress, which does.

    Invariant: `num_computed < num_known` between steps. A step that catches up samples a token,
    which counts as known from then on, first in flight, then as output.
    """

    __slots__ = (
        "_token_ids",
        "arrival",
        "cache_salt",
        "choice",
        "finish_reason",
        "max_tokens",
        "num_cached",
        "num_computed",
        "num_failures",
        "num_in_flight",
        "num_output",
        "num_preemptions",
        "num_prompt",
        "num_registered",
        "page_hashes",
        "pages",
        "params",
        "priority",
        "request_id",
        "root_parts",
        "seed",
        "slot",
        "start_tag",
        "stop_reason",
        "tenant",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        arrival: int,
        *,
        priority: int = 0,
        cache_salt: bytes = b"",
        tenant: bytes = b"",
        choice: int = 0,
        seed: int = 0,
    ) -> None:
        """arrival: a running number, not a time. seed: already resolved, never drawn here."""
        self.request_id = request_id
        self.params = params
        self.arrival = arrival
        self.priority = priority
        self.cache_salt = cache_salt
        self.tenant = tenant
        self.choice = choice
        self.seed = seed
        assert params.max_tokens is not None, "max_tokens is resolved before a Request is made"
        self.max_tokens = params.max_tokens
        # Whatever else changes the KV of the same tokens joins here: adapter, KV regime, media.
        # Fixed once a page is hashed; to change it later, clear `page_hashes` too.
        self.root_parts: tuple[bytes, ...] = (cache_salt,)

        self._token_ids = list(prompt_token_ids)
        self.num_prompt = len(self._token_ids)
        self.num_output = 0
        self.num_in_flight = 0  # tokens sampled on the device that the host has not read
        self.num_computed = 0  # tokens whose KV is written, or whose writing is planned
        self.num_cached = 0  # prompt tokens served by the prefix cache when first admitted
        self.num_preemptions = 0  # times it lost its pages and had to be recomputed
        self.num_failures = 0

        self.start_tag = 0  # its place among all tenants' requests; fixed when it is queued
        self.slot: int | None = None
        # Per KV group, the page of each logical page; 0 where it fell out of the group's window.
        self.pages: list[list[int]] = []
        self.page_hashes: list[bytes] = []
        self.num_registered = 0  # leading logical pages that the prefix cache has seen

        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None

    @property
    def status(self) -> RequestStatus:
        if self.finish_reason is not None:
            return RequestStatus.FINISHED
        return RequestStatus.WAITING if self.slot is None else RequestStatus.RUNNING

    @property
    def num_tokens(self) -> int:
        """Tokens whose ids the host knows: the prompt and the output read so far."""
        return self.num_prompt + self.num_output

    @property
    def num_known(self) -> int:
        """Tokens that exist, those still on the device included."""
        return self.num_prompt + self.num_output + self.num_in_flight

    @property
    def prompt_token_ids(self) -> list[int]:
        """A copy."""
        return self._token_ids[: self.num_prompt]

    @property
    def output_token_ids(self) -> list[int]:
        """A copy."""
        return self._token_ids[self.num_prompt :]

    def token_ids(self, first: int, count: int) -> list[int]:
        """Ids of the tokens first .. first+count-1, without those the host does not know yet."""
        return self._token_ids[first : first + count]

    def append_token(self, token_id: int) -> None:
        """Add one output token: the only way in which the tokens of a request grow."""
        self._token_ids.append(token_id)
        self.num_output += 1

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status}, prompt={self.num_prompt}, "
            f"output={self.num_output}+{self.num_in_flight}, computed={self.num_computed})"
        )
