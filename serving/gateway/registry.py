"""The ids of open requests, and the account of how requests end."""

import logging
from collections.abc import Iterable

from ...engine.errors import DuplicateRequest
from .metrics import GatewayMetrics
from .open_request import OpenRequest

logger = logging.getLogger(__name__)

_Key = tuple[bytes, str]


class Registry:
    """Finds the open requests of a tenant by the ids that it gave them."""

    def __init__(self, metrics: GatewayMetrics, *, logs_requests: bool, max_log_len: int) -> None:
        """max_log_len: characters of a prompt in the log; 0 logs none."""
        self._metrics = metrics
        self._logs_requests = logs_requests
        self._max_log_len = max_log_len
        self._open: dict[_Key, OpenRequest | None] = {}  # None while it is prepared
        self._aborted: set[_Key] = set()  # of those

    @property
    def num_open(self) -> int:
        return len(self._open)

    def reserve(self, tenant: bytes, request_id: str) -> None:
        """Raises DuplicateRequest."""
        if (tenant, request_id) in self._open:
            raise DuplicateRequest(
                f"the request id {request_id!r} is that of an open request; give each its own, or "
                "leave it out",
                field="request_id",
            )
        self._open[tenant, request_id] = None
        self._metrics.num_open += 1

    def release(self, tenant: bytes, request_id: str) -> None:
        """Of a request that was reserved and not opened."""
        del self._open[tenant, request_id]
        self._aborted.discard((tenant, request_id))
        self._metrics.num_open -= 1

    def add(self, request: OpenRequest) -> bool:
        """Of a reserved id. False if it was aborted meanwhile."""
        key = request.terms.tenant, request.terms.request_id
        self._open[key] = request
        return key not in self._aborted

    def abort(self, tenant: bytes, request_ids: Iterable[str]) -> list[OpenRequest]:
        """Those that are open and are to be ended now. Unknown ids may just have ended."""
        found = []
        for request_id in request_ids:
            request = self._open.get((tenant, request_id))
            if request is not None:
                found.append(request)
            elif (tenant, request_id) in self._open:
                self._aborted.add((tenant, request_id))
        return found

    def on_ended(self, request: OpenRequest) -> None:
        """Once for each request that was added."""
        request.place.leave()
        self.release(request.terms.tenant, request.terms.request_id)
        times, metrics = request.times, self._metrics
        num_tokens = request.num_output_tokens
        metrics.finished_by_reason[request.ended_by] += 1
        metrics.e2e_latency.observe((times.ended - times.arrived) * 1e-9)
        metrics.prompt_tokens_hist.observe(len(request.text.prompt_token_ids))
        metrics.generation_tokens_hist.observe(num_tokens)
        if times.first_token:
            decode_s = (times.last_token - times.first_token) * 1e-9
            metrics.decode_time.observe(decode_s)
            num_later = num_tokens - len(request.choices)
            if num_later > 0:
                metrics.time_per_output_token.observe(decode_s * len(request.choices) / num_later)
        if self._logs_requests:
            self._log(request, num_tokens)

    def _log(self, request: OpenRequest, num_tokens: int) -> None:
        times = request.times
        fields = {
            "request_id": request.terms.request_id,
            "model": request.terms.model,
            "prompt_tokens": len(request.text.prompt_token_ids),
            "output_tokens": num_tokens,
            "cached_tokens": request.num_cached,
            "finish_reason": request.ended_by,
            "queue_ms": ((times.admitted or times.ended) - times.arrived) // 1_000_000,
            "first_token_ms": max(0, times.first_token - times.arrived) // 1_000_000,
            "total_ms": (times.ended - times.arrived) // 1_000_000,
            "resumed": request.num_resumes,
        }
        if self._max_log_len and request.text.prompt is not None:
            fields["prompt"] = request.text.prompt[: self._max_log_len]
        logger.info("request ended", extra=fields)
