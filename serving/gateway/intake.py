"""The way in: a request is let in, prepared and submitted, or refused with its reason.

Preparing (templates, encoding) runs on threads, so that no prompt keeps other streams waiting.
"""

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from ...engine.errors import EngineUnavailable, UsageError
from ...engine.request import FinishReason
from ...engine.sampling_params import MAX_N
from .callers import Caller, Callers
from .core_link import CoreLink
from .metrics import GatewayMetrics
from .open_request import OpenRequest, Sink, Terms
from .prepare import AnyRequest, Served, check_envelope, prepare, text_size
from .registry import Registry
from .waiting import Waiting

# Long texts have a thread of their own: they keep neither the short ones waiting, nor more than one
# at a time in memory, which is many times their size while they are encoded.
_NUM_THREADS = 2
_LONG_CHARACTERS = 256 << 10
# A guess, until a prompt is encoded.
_CHARACTERS_PER_TOKEN = 4
_STARTING_RETRY_S = 1.0


class Intake:
    """Opens requests; how they end is the link's and the registry's."""

    def __init__(
        self,
        callers: Callers,
        waiting: Waiting,
        registry: Registry,
        link: CoreLink,
        metrics: GatewayMetrics,
    ) -> None:
        self._callers = callers
        self._waiting = waiting
        self._registry = registry
        self._link = link
        self._metrics = metrics
        self._numbers = itertools.count(1)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="prepare")
        self._thread_of_long = ThreadPoolExecutor(1, thread_name_prefix="prepare-long")
        self.served: Served | None = None  # once the model's files are read and the core was there
        self.is_draining = False

    def require_served(self) -> Served:
        """Raises EngineUnavailable."""
        if self.is_draining:
            raise EngineUnavailable("the server is shutting down; use another one")
        if self.served is None:
            raise EngineUnavailable(
                f"the engine is starting; try again in {_STARTING_RETRY_S:g} s",
                retry_after_s=_STARTING_RETRY_S,
            )
        return self.served

    async def on_thread[*A, R](self, size: int, function: Callable[[*A], R], *given: *A) -> R:
        """For work on texts of so many characters or ids, which takes as long as they are."""
        threads = self._threads if size <= _LONG_CHARACTERS else self._thread_of_long
        return await asyncio.get_running_loop().run_in_executor(threads, function, *given)

    async def open(self, message: AnyRequest, caller: Caller, sink: Sink) -> OpenRequest:
        """A request under way. Raises QuireError; cancelled, it leaves nothing behind."""
        try:
            return await self._open(message, caller, sink)
        except UsageError:
            self._metrics.rejected_by_reason["invalid"] += 1
            raise
        except EngineUnavailable:
            self._metrics.rejected_by_reason["unavailable"] += 1
            raise

    async def _open(self, message: AnyRequest, caller: Caller, sink: Sink) -> OpenRequest:
        arrived = time.monotonic_ns()
        served = self.require_served()
        check_envelope(message, served)
        num_choices = min(max(1, message.sampling_params.n), MAX_N)
        size = text_size(message)
        num_tokens = 1 + size // _CHARACTERS_PER_TOKEN
        place = self._waiting.enter(num_choices, num_choices * num_tokens)
        number = next(self._numbers)
        request_id = message.request_id or f"quire-{secrets.token_hex(8)}"
        try:
            self._registry.reserve(caller.tenant, request_id)
            try:
                text = await self.on_thread(size, prepare, message, served)
                self._waiting.correct(place, num_choices * len(text.prompt_token_ids))
                given = text.params.seed
                terms = Terms(
                    request_id,
                    message.model or served.names[0],
                    caller.tenant,
                    self._callers.salt_of(caller, message.cache_salt),
                    message.priority,
                    secrets.randbits(63) if given is None else given,
                )
                request = OpenRequest(number, text, terms, place, served.files.tokenizer, sink)
                request.times.arrived = arrived
                self._link.submit(request)
            except BaseException:
                self._registry.release(caller.tenant, request_id)
                raise
        except BaseException:
            place.leave()
            raise
        self._metrics.num_prompt_tokens += len(text.prompt_token_ids)
        if not self._registry.add(request):
            self._link.finish(request, FinishReason.ABORT)
        return request

    def cancel(self, request: OpenRequest) -> None:
        """End a request whose caller has gone."""
        self._link.cancel(request)

    def abort(self, caller: Caller, request_ids: Iterable[str]) -> None:
        """End requests of this caller with FinishReason.ABORT."""
        for request in self._registry.abort(caller.tenant, request_ids):
            self._link.finish(request, FinishReason.ABORT)

    def note_unauthenticated(self) -> None:
        self._metrics.rejected_by_reason["unauthenticated"] += 1

    def close(self) -> None:
        for threads in (self._threads, self._thread_of_long):
            threads.shutdown(wait=False, cancel_futures=True)
