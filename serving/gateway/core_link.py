"""The gateway's side of the stream to the core: pieces to their sinks, and requests into the next
core when one is lost.

Knows open requests and the core's client; who may open one, and when, is the intake's.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence

from ...engine.answer_reader import Piece
from ...engine.core_io import PositionLogprobs, StepOutput
from ...engine.errors import (
    DeadlinePassed,
    EngineError,
    EngineStopped,
    EngineUnavailable,
    QuireError,
    RequestError,
    SlowReader,
)
from ...engine.request import FinishReason
from ..core_client.client import CoreClient, CoreStream
from .answers import prompt_logprobs
from .metrics import GatewayMetrics
from .open_request import Choice, OpenRequest
from .statuses import internal_error

logger = logging.getLogger(__name__)

# A request that was running whenever a core was lost may be what the cores die of.
MAX_RESUMES = 3
_RECONNECT_S = 0.1
# Outputs that are read without a pause for others, when many steps come at once.
_BREATH = 1024


class CoreLink:
    """All open requests. run() is to be a task for as long as the process lives."""

    def __init__(
        self,
        client: CoreClient,
        metrics: GatewayMetrics,
        on_lost: Callable[[], None],
        on_ended: Callable[[OpenRequest], None],
    ) -> None:
        """on_lost: the core is gone, and until it is back nothing comes. on_ended: once for each
        request, after its last piece.
        """
        self._client = client
        self._metrics = metrics
        self._on_lost = on_lost
        self._on_ended = on_ended
        self._choices: dict[str, Choice] = {}
        self._stream: CoreStream | None = None
        self._telling: set[asyncio.Task[None]] = set()

    @property
    def num_open(self) -> int:
        """Answers under way."""
        return len(self._choices)

    def open_requests(self) -> list[OpenRequest]:
        return list({id(c.request): c.request for c in self._choices.values()}.values())

    async def run(self) -> None:
        """Follow the core across its restarts, until cancelled."""
        while True:
            stream = self._stream = self._client.open_stream()
            self._resume(stream)
            try:
                async for outputs in stream:
                    await self._dispatch(outputs)
            except EngineStopped as error:
                if self._choices:
                    logger.warning("%s; %d answers wait for the next one", error, self.num_open)
            except Exception:
                # What the core says cannot be read: as good as lost.
                logger.exception("the stream of the core failed")
            finally:
                self._stream = None  # what comes meanwhile waits for the next one
                stream.close()
            self._on_lost()
            await asyncio.sleep(_RECONNECT_S)

    def submit(self, request: OpenRequest) -> None:
        """Start a request; while the core is away it waits. Raises RequestError."""
        request.times.submitted = time.monotonic_ns()
        if self._stream is not None:
            self._stream.submit([choice.submission() for choice in request.choices])
            request.was_sent = True
        self._choices.update((choice.core_id, choice) for choice in request.choices)

    def cancel(self, request: OpenRequest) -> None:
        """End a request that nobody reads any more, if it has not: nothing goes to its sink."""
        self._drop(request)
        # Each refers to it: so its prompt is freed now, not when the collector comes by.
        request.choices.clear()

    def finish(self, request: OpenRequest, reason: FinishReason) -> None:
        """End the answers that are still open with a last piece."""
        left = [choice for choice in request.choices if not choice.is_done]
        self._abort(left)
        for choice in left:
            output = StepOutput(choice.core_id, (), finish_reason=reason)
            self._deliver(choice, choice.reader.read(output))

    def fail(self, request: OpenRequest, error: QuireError) -> None:
        """End a request without last pieces."""
        is_callers = isinstance(error, SlowReader | DeadlinePassed)
        request.ended_by = (FinishReason.ABORT if is_callers else FinishReason.ERROR).value
        if self._drop(request):
            self._metrics.num_cancelled_slow += isinstance(error, SlowReader)
            request.sink.on_error(request, error)

    # Outputs

    async def _dispatch(self, outputs: list[StepOutput]) -> None:
        now = time.monotonic_ns()
        for number, output in enumerate(outputs, 1):
            choice = self._choices.get(output.request_id)
            if choice is None:
                continue  # aborted after it was made
            request = choice.request
            if request.held is not None:
                request.held.append((choice, output, now))
            elif output.prompt_logprobs is not None and not request.has_told_prompt_logprobs:
                request.has_told_prompt_logprobs = True
                request.held = [(choice, output, now)]
                telling = asyncio.create_task(self._tell(request, output.prompt_logprobs))
                self._telling.add(telling)
                telling.add_done_callback(self._telling.discard)
            else:
                self._take(choice, output, now)
            if number % _BREATH == 0:
                await asyncio.sleep(0)

    async def _tell(self, request: OpenRequest, positions: Sequence[PositionLogprobs]) -> None:
        """The logprobs of a prompt, and then what came meanwhile."""
        try:
            tokenizer = request.tokenizer
            told = await asyncio.to_thread(prompt_logprobs, positions, tokenizer)
        except Exception as error:
            self.fail(request, internal_error(error))
            return
        request.prompt_logprobs = told
        held, request.held = request.held or [], None
        for choice, output, now in held:
            if choice.core_id in self._choices:
                self._take(choice, output, now)

    def _take(self, choice: Choice, output: StepOutput, now: int) -> None:
        try:
            self._on_output(choice, output, now)
        except Exception as error:
            # The border of a request: whatever one shows to be broken, the others go on.
            self.fail(choice.request, internal_error(error))

    def _on_output(self, choice: Choice, output: StepOutput, now: int) -> None:
        request, times = choice.request, choice.request.times
        if output.token_ids:
            if times.first_token == 0:
                self._on_first_token(request, output, now)
            else:
                self._metrics.inter_token_latency.observe((now - times.last_token) * 1e-9)
            times.last_token = now
        piece = choice.reader.read(output)
        choice.token_ids += piece.token_ids
        self._metrics.num_generation_tokens += len(piece.token_ids)
        if piece.finish_reason is not None and piece.must_abort:
            self._abort([choice])
        self._deliver(choice, piece)

    def _on_first_token(self, request: OpenRequest, output: StepOutput, now: int) -> None:
        times, metrics = request.times, self._metrics
        request.place.leave(has_started=True)
        times.first_token = now
        times.admitted = min(now, times.submitted + output.queue_ns)
        request.num_cached = output.num_cached
        metrics.num_cached_tokens += output.num_cached
        metrics.time_to_first_token.observe((now - times.arrived) * 1e-9)
        metrics.queue_time.observe((times.admitted - times.arrived) * 1e-9)
        metrics.prefill_time.observe((now - times.admitted) * 1e-9)

    def _deliver(self, choice: Choice, piece: Piece) -> None:
        request = choice.request
        if piece.finish_reason is not None:
            choice.is_done = True
            self._choices.pop(choice.core_id, None)
            request.num_open -= 1
            if request.is_done:
                request.times.ended = time.monotonic_ns()
                request.ended_by = piece.finish_reason.value
        try:
            request.sink.on_piece(choice, piece)
        except Exception as error:
            if not request.is_done:
                raise
            request.ended_by = FinishReason.ERROR.value
            request.sink.on_error(request, internal_error(error))
        if request.is_done:
            self._on_ended(request)

    # Ends and losses

    def _resume(self, stream: CoreStream) -> None:
        for request in self.open_requests():
            if request.num_resumes >= MAX_RESUMES:
                why = (
                    f"the engine was lost {request.num_resumes + 1} times while this request was "
                    "under way, which is not tried again"
                )
                self.fail(request, EngineUnavailable(why))
                continue
            if request.held is not None:
                request.held.clear()  # the next core makes them again
            if request.was_sent:
                request.num_resumes += 1
                self._metrics.num_resumed += 1
            request.was_sent = True
            try:
                stream.submit(c.submission() for c in request.choices if not c.is_done)
            except RequestError as error:
                self.fail(request, EngineError(f"the request cannot go on: {error}"))

    def _drop(self, request: OpenRequest) -> bool:
        """Forget a request everywhere. False if it had ended."""
        if request.is_done:
            return False
        self._abort([choice for choice in request.choices if not choice.is_done])
        for choice in request.choices:
            choice.is_done = True
        request.num_open = 0
        request.times.ended = time.monotonic_ns()
        self._on_ended(request)
        return True

    def _abort(self, choices: Iterable[Choice]) -> None:
        core_ids = [choice.core_id for choice in choices]
        for core_id in core_ids:
            self._choices.pop(core_id, None)
        if self._stream is not None:
            self._stream.abort(core_ids)
