"""The step loop: schedule -> build -> run -> sample -> read.

One step ahead: step n+1 is dispatched with step n's tokens still on the device, so a stop takes
effect one step late and the extra token is dropped. The core owns no thread and no text; token ids
in, StepOutputs out.
"""

import logging
import time
from collections import deque
from dataclasses import asdict

import numpy as np

from ..layers import rows
from ..layers.programs import SCORE_ROWS, Hidden, Variant
from ..layers.sampling import TokenLogprobs
from .batch_builder import BatchBuilder, PackedStep
from .core_io import PositionLogprobs, StepOutput, Submission
from .errors import RequestError
from .metrics import CoreMetrics
from .request import FinishReason, Request
from .row_packer import ban_completions, pack_row, pack_tables, row_needs
from .runner import ROWS_PER_UPDATE, Runner
from .scheduler import Scheduler
from .step_plan import StepPlan
from .tracked import InFlight, RowFault, Scores, Tracked

logger = logging.getLogger(__name__)

# A request whose steps failed this often is ended.
_MAX_FAILURES = 2
_ROW_FAILED = "the engine failed at this request, and at no other; its log says why"


class EngineCore:
    """Requests in, tokens out. Not thread-safe: one caller drives it."""

    def __init__(
        self, runner: Runner, scheduler: Scheduler, *, eos_ids: frozenset[int], depth: int = 1
    ) -> None:
        """depth: steps in flight while the next one is planned, 0 or 1."""
        self.scheduler = scheduler
        self.metrics = CoreMetrics()
        self.runner = runner
        self._builder = BatchBuilder(runner.buckets)
        self._eos_ids = eos_ids
        self._depth = depth
        self._vocab = runner.programs.model.vocab_size
        self._tracked: dict[str, Tracked] = {}
        self._pending: deque[InFlight] = deque()
        self._num_arrived = 0
        # Kept across a failure in the middle of a step: these tokens were read and stand.
        self._outputs: list[StepOutput] = []
        self._gives_all_logprobs = runner.num_logprobs >= self._vocab
        self._lap_began_ns = 0  # by time.perf_counter_ns(), in a step

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._pending)

    def submit(self, submission: Submission) -> None:
        """Queue a request that was checked. Raises RequestError when it can never fit."""
        s = submission
        if s.request_id in self._tracked:
            raise RequestError(f"the request id {s.request_id!r} is in use", field="request_id")
        self._num_arrived += 1
        request = Request(
            s.request_id, s.prompt_token_ids, s.params, self._num_arrived,
            priority=s.priority, cache_salt=s.cache_salt, tenant=s.tenant, choice=s.choice,
            seed=s.seed,
        )  # fmt: skip
        for token_id in s.output_token_ids:
            request.append_token(token_id)
        stop_ids = frozenset(s.params.stop_token_ids or ())
        if not s.params.ignore_eos:
            stop_ids |= self._eos_ids
        needs = row_needs(request, s.bad_words, self._vocab, stop_ids)
        tracked = Tracked(request, needs, s.bad_words, stop_ids, s.submitted_ns)
        self.scheduler.add(request)  # last: whatever raises, a request is known to both or to none
        self._tracked[s.request_id] = tracked

    def counters(self) -> dict[str, int]:
        """Name -> count since start (metrics.py). From any thread; a step may be under way."""
        counts: dict[str, int] = asdict(self.metrics)
        counts["num_preemptions"] = self.scheduler.num_preemptions
        counts["num_evicted_pages"] = self.scheduler.pool.num_evicted
        if self.scheduler.prefix_cache is not None:
            counts["num_prefix_queried_tokens"] = self.scheduler.prefix_cache.num_queried_tokens
            counts["num_prefix_hit_tokens"] = self.scheduler.prefix_cache.num_hit_tokens
        return counts

    def abort(self, request_id: str) -> None:
        """End a request now; its pages are free for the next step. Unknown ids are ignored: it may
        just have ended.
        """
        tracked = self._tracked.pop(request_id, None)
        if tracked is not None:
            self.scheduler.finish(tracked.request, FinishReason.ABORT)

    def step(self) -> list[StepOutput]:
        """Dispatch the next step, if any, and read the oldest one when enough are in flight."""
        self._lap_ns()  # between steps; nobody's
        try:
            plan = self._last_plan = self.scheduler.schedule(
                time.monotonic(), most_steps=self._most_steps()
            )
            self.metrics.schedule_ns += self._lap_ns()
            if plan.chunks:
                self._dispatch(plan)
                self.metrics.build_ns += self._lap_ns()
            while self._pending and (len(self._pending) > self._depth or not plan.chunks):
                self._read(self._pending.popleft())
        except Exception as error:
            # The border of a step: whatever the device raised, the loop goes on with the others.
            self._recover(error)
        return self.take_outputs()

    def take_outputs(self) -> list[StepOutput]:
        """What was read and not yet returned; step() does this, unless it raised."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def _lap_ns(self) -> int:
        """Since the last call. Each moment of a step is in one lap, wherever it reads."""
        began_ns, self._lap_began_ns = self._lap_began_ns, time.perf_counter_ns()
        return self._lap_began_ns - began_ns

    # Dispatch

    def _dispatch(self, plan: StepPlan) -> None:
        self.metrics.num_steps += 1
        self.metrics.num_tokens += plan.total_tokens
        tracked = [self._tracked[chunk.request.request_id] for chunk in plan.chunks]
        self._write_rows(plan)
        step = self._builder.build(plan, [t.needs for t in tracked])
        if step.layout.num_steps > 1:
            tokens = self.runner.decode(step.packed, step.layout, _variant(tracked))
            tokens.copy_to_host_async()
            self._pending.append(InFlight(plan.chunks, tokens, None, ()))
            return
        hidden = self.runner.forward(step.packed, step.layout)
        scores = tuple(self._score(plan, step, hidden))
        sampled = logprobs = None
        sampling = [t for t, chunk in zip(tracked, plan.chunks, strict=True) if chunk.samples]
        if sampling:
            if any(t.needs.step_mask for t in sampling):
                # The mask follows from the last token, which a step in flight may still hold.
                self.metrics.build_ns += self._lap_ns()
                while self._pending:
                    self._read(self._pending.popleft())
            mask = self._step_mask(plan, hidden)
            sampled = self.runner.sample(hidden, _variant(sampling), mask)
            sampled.token_and_flag.copy_to_host_async()
            if any(t.needs.logprobs for t in sampling):
                logprobs = self.runner.score(hidden.rows, 0, sampled.token)
        read = None if sampled is None else sampled.token_and_flag
        self._pending.append(InFlight(plan.chunks, read, logprobs, scores))

    def _most_steps(self) -> int:
        """Steps that may go by before the host sees a token."""
        most = self.runner.buckets.decode_steps
        if most > 1 and not all(t.needs.allows_steps for t in self._tracked.values()):
            return 1
        return most

    def _write_rows(self, plan: StepPlan) -> None:
        """Write the device rows of admitted requests, in full."""
        if not plan.admitted:
            return
        first_by_slot = {chunk.slot: chunk.first for chunk in plan.chunks}
        narrow = []
        now_ns = time.monotonic_ns()
        for request in plan.admitted:
            assert request.slot is not None
            tracked = self._tracked[request.request_id]
            if tracked.queue_ns is None:
                tracked.queue_ns = now_ns - tracked.submitted_ns
            try:
                row, tables = self._pack(tracked, first_by_slot[request.slot])
            except Exception as error:
                raise RowFault(request, error) from error
            if tables is None:
                narrow.append(row)
            else:
                self.runner.update_rows(row[None], tables)
        for at in range(0, len(narrow), ROWS_PER_UPDATE):
            packed = np.zeros((ROWS_PER_UPDATE, rows.NUM_COLUMNS), np.int32)
            packed[:, 0] = self.runner.buckets.slots  # padding rows are dropped
            some = narrow[at : at + ROWS_PER_UPDATE]
            packed[: len(some)] = some
            self.runner.update_rows(packed)

    def _pack(self, tracked: Tracked, first: int) -> tuple[np.ndarray, rows.RowTables | None]:
        """The device row of a request, and its tables if it needs any."""
        request = tracked.request
        row = pack_row(request, first, self._vocab)
        if not tracked.needs.tables:
            return row, None
        return row, pack_tables(request, tracked.bad_words, tracked.stop_ids, self._vocab)

    def _score(self, plan: StepPlan, step: PackedStep, hidden: Hidden) -> list[Scores]:
        """Dispatch the prompt logprobs that this step's hidden states give."""
        scores = []
        for chunk, first_token in zip(plan.chunks, step.first_token, strict=True):
            request, scored = chunk.request, chunk.scored
            # Recomputation after preemption scores again what it lost.
            for first in scored[::SCORE_ROWS]:
                count = min(SCORE_ROWS, scored.stop - first)
                targets = np.zeros(SCORE_ROWS, np.int32)
                targets[:count] = request.token_ids(first + 1, count)
                result = self.runner.score(
                    hidden.tokens, first_token + first - chunk.first, targets
                )
                scores.append(Scores(request, first, count, result))
        return scores

    def _step_mask(self, plan: StepPlan, hidden: Hidden) -> np.ndarray | None:
        mask = None
        for row, chunk in enumerate(plan.chunks):
            tracked = self._tracked.get(chunk.request.request_id)
            if tracked is None or not (chunk.samples and tracked.needs.step_mask):
                continue
            if mask is None:
                words = rows.num_words(self._vocab)
                mask = np.full((hidden.slots.shape[0], words), 0xFFFFFFFF, np.uint32)
            longest = max(len(word) for word in tracked.bad_words)
            request = tracked.request
            start = max(0, request.num_tokens - longest)
            known = request.token_ids(start, request.num_tokens - start)
            ban_completions(mask[row], known, tracked.bad_words)
        return mask

    # Reading

    def _read(self, flight: InFlight) -> None:
        # All waiting first, so that its time can be told from that of the host's own work.
        prompt_logprobs = [_on_host(scores.result) for scores in flight.scores]
        steps = []
        if flight.tokens is not None:
            tokens = np.asarray(flight.tokens)
            steps = tokens.reshape(-1, *tokens.shape[-2:]).tolist()
        logprobs = None if flight.logprobs is None else _on_host(flight.logprobs)
        self.metrics.device_ns += self._lap_ns()
        for scores, result in zip(flight.scores, prompt_logprobs, strict=True):
            try:
                self._keep_scores(scores, result)
            except Exception as error:
                self._end_alone(scores.request, error)
        for row, chunk in enumerate(flight.chunks):
            request = chunk.request
            if not chunk.samples:
                continue  # a prompt in progress
            for tokens, flags in steps[: chunk.num_steps]:
                if request.finish_reason is not None:
                    break  # the extra tokens of a request that has ended
                tracked = self._tracked[request.request_id]
                try:
                    if flags[row]:
                        self._end(tracked, FinishReason.ERROR, "the logits were not finite")
                    else:
                        self._on_token(tracked, tokens[row], logprobs, row)
                except Exception as error:
                    self._end_alone(request, error)
        self.metrics.emit_ns += self._lap_ns()

    def _on_token(
        self, tracked: Tracked, token_id: int, logprobs: TokenLogprobs | None, row: int
    ) -> None:
        request, params = tracked.request, tracked.request.params
        self.scheduler.on_token(request, token_id)
        self.metrics.num_output_tokens += 1
        reason: FinishReason | None = None
        stop_reason: int | None = None
        if token_id in tracked.stop_ids:
            reason = FinishReason.STOP
            is_eos = token_id in self._eos_ids and not params.ignore_eos
            stop_reason = None if is_eos else token_id
        elif (
            request.num_output >= request.max_tokens
            or request.num_tokens >= self.scheduler.config.max_model_len
        ):
            reason = FinishReason.LENGTH
        own: tuple[PositionLogprobs, ...] = ()
        if logprobs is not None and params.logprobs is not None:
            own = (self._position(logprobs, row, token_id, params.logprobs),)
        prompt_logprobs = None
        if request.num_output == 1 and params.prompt_logprobs is not None:
            prompt_logprobs = tuple(tracked.prompt_logprobs)
        is_first = bool(tracked.queue_ns)
        queue_ns, tracked.queue_ns = tracked.queue_ns or 0, 0
        if reason is not None:
            self.scheduler.finish(request, reason, stop_reason)
            del self._tracked[request.request_id]
        self._outputs.append(
            StepOutput(
                request.request_id,
                (token_id,),
                own,
                prompt_logprobs,
                reason,
                stop_reason,
                request.num_cached if is_first else 0,
                queue_ns,
            )
        )

    def _position(
        self, result: TokenLogprobs, row: int, token_id: int, wanted: int
    ) -> PositionLogprobs:
        """wanted: how many of the most likely; -1 keeps all, in order of id."""
        top_ids, top = result.top_ids[row], result.top[row]
        if wanted >= 0:
            if self._gives_all_logprobs:
                order = np.argsort(-top, kind="stable")
                top_ids, top = top_ids[order], top[order]
            top_ids, top = top_ids[:wanted].copy(), top[:wanted].copy()
        chosen, rank = float(result.chosen[row]), int(result.rank[row])
        return PositionLogprobs(token_id, chosen, rank, top_ids, top)

    def _keep_scores(self, scores: Scores, result: TokenLogprobs) -> None:
        """result: that of the scores, on the host."""
        if scores.request.finish_reason is not None:
            return
        tracked = self._tracked[scores.request.request_id]
        wanted = scores.request.params.prompt_logprobs
        assert wanted is not None
        known = len(tracked.prompt_logprobs)
        targets = scores.request.token_ids(scores.first + 1, scores.count)
        for row in range(max(0, known - scores.first), scores.count):
            position = self._position(result, row, targets[row], wanted)
            tracked.prompt_logprobs.append(position)

    def _end(self, tracked: Tracked, reason: FinishReason, why: str) -> None:
        request = tracked.request
        logger.error("request %s ended: %s", request.request_id, why)
        self.scheduler.finish(request, reason, why)
        del self._tracked[request.request_id]
        self._outputs.append(
            StepOutput(
                request.request_id,
                (),
                finish_reason=reason,
                stop_reason=why,
                num_cached=request.num_cached,
            )
        )

    def _end_alone(self, request: Request, error: Exception) -> None:
        """The border of a row: whatever one shows to be broken, its neighbours go on."""
        logger.error("the row of request %s failed", request.request_id, exc_info=error)
        tracked = self._tracked.get(request.request_id)
        if tracked is not None and tracked.request is request and request.finish_reason is None:
            self._end(tracked, FinishReason.ERROR, _ROW_FAILED)

    def _recover(self, error: Exception) -> None:
        """The donated arrays of a failed step are lost: start over, and end who failed before."""
        self.metrics.num_failed_steps += 1
        logger.error("a step failed and its requests are recomputed", exc_info=error)
        self._pending.clear()
        culprit = error.request if isinstance(error, RowFault) else None
        for request in self.scheduler.recompute_all():
            request.num_failures += culprit is None
            tracked = self._tracked[request.request_id]
            tracked.prompt_logprobs.clear()
            if request is culprit:
                self._end(tracked, FinishReason.ERROR, _ROW_FAILED)
            elif request.num_failures >= _MAX_FAILURES:
                why = f"its steps failed {request.num_failures} times; the engine's log says why"
                self._end(tracked, FinishReason.ERROR, why)
        self.runner.allocate()


def _on_host(result: TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(*(np.asarray(a) for a in result))


def _variant(sampling: list[Tracked]) -> Variant:
    if all(t.needs.is_plain_greedy for t in sampling):
        return Variant.GREEDY
    return Variant.GENERAL
