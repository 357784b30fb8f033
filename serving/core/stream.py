"""The requests of one Run call: from commands into the step loop, and the outputs of its steps out.

Commands and messages are the asyncio thread's, outputs come on the loop's thread. Neither waits for
the other: between them is a queue, and whoever does not read it loses the stream.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from ...engine.core_io import StepOutput, Submission
from ...engine.errors import RequestError, UsageError
from ...engine.loop import EngineLoop
from ...engine.request import FinishReason
from ...engine.token_checks import TokenLimits, check_token_request
from ...protos.quire.core.v1 import core_pb2
from ..core_client.wire import outputs_to_proto, submission_from_proto

logger = logging.getLogger(__name__)

# Of one output; more logprobs are refused. protobuf's own limit, 2 GiB, would end the stream.
MAX_OUTPUT_BYTES = 256 << 20
# Outputs that may wait for the reader: 256 requests for 256 steps, and about 20 MB.
MAX_PENDING = 65536


class Stream:
    """One caller's requests. `wake` is called from the loop's thread when a message is ready."""

    def __init__(self, loop: EngineLoop, limits: TokenLimits, wake: Callable[[], None]) -> None:
        self._loop = loop
        self._limits = limits
        self._wake = wake
        self._open: set[str] = set()
        self._refused: list[StepOutput] = []
        self._step: list[StepOutput] = []  # of the step under way; the loop's thread owns it
        self._steps: deque[list[StepOutput]] = deque()
        # Two counters, each with one writer, instead of one that two threads would change.
        self._num_made = 0
        self._num_taken = 0
        self.is_overrun = False
        self._is_ended = False

    # The asyncio thread

    def take(self, commands: core_pb2.Commands) -> None:
        """Pass commands on to the loop; a bad submit ends with an output that says why."""
        if self._is_ended:
            return  # sent before the caller knew
        submissions = []
        for message in commands.submits:
            try:
                if message.request_id in self._open:
                    raise RequestError(
                        f"the request id {message.request_id!r} is in use; give each request its "
                        "own",
                        field="request_id",
                    )
                submissions.append(_checked(submission_from_proto(message), self._limits))
            except UsageError as error:
                self._refused.append(_ended(message.request_id, str(error)))
            except Exception:
                # The border of a request: whatever one shows to be broken, the others go on.
                logger.exception("request %s could not be read", message.request_id)
                why = "the engine failed to read the request; its log says why"
                self._refused.append(_ended(message.request_id, why))
            else:
                self._open.add(message.request_id)
        if self._refused:
            self._wake()
        if submissions:
            self._loop.submit(submissions, self._on_output)
        if commands.aborts:
            self._open.difference_update(commands.aborts)
            self._loop.abort(commands.aborts)

    def message(self) -> core_pb2.StepOutputs | None:
        """All that is ready, as one message; None if nothing is."""
        outputs: list[StepOutput] = []
        while self._steps:
            outputs += self._steps.popleft()
        self._num_taken += len(outputs)
        sent = []
        for output in outputs:
            if output.request_id not in self._open:
                continue  # aborted after it was made
            if output.logprobs or output.prompt_logprobs is not None:
                output = self._bounded(output)
            if output.finish_reason is not None:
                self._open.discard(output.request_id)
            sent.append(output)
        # Apart: one that was refused for its id leaves the request of that id open.
        sent += self._refused
        self._refused = []
        return outputs_to_proto(sent) if sent else None

    def _bounded(self, output: StepOutput) -> StepOutput:
        num_bytes = _logprob_bytes(output)
        if num_bytes <= MAX_OUTPUT_BYTES:
            return output
        self._loop.abort([output.request_id])
        why = (
            f"its logprobs are {num_bytes >> 20} MiB and at most {MAX_OUTPUT_BYTES >> 20} MiB can "
            "be sent at once; ask for fewer prompt_logprobs or send a shorter prompt"
        )
        return _ended(output.request_id, why)

    def end(self) -> None:
        """Abort what is still open."""
        self._is_ended = True
        self._loop.abort(list(self._open))
        self._open.clear()

    # The loop's thread

    def _on_output(self, output: StepOutput) -> None:
        self._step.append(output)

    def on_step(self) -> None:
        """Publish the outputs of a step."""
        if not self._step or self.is_overrun:
            self._step.clear()
            return
        self._num_made += len(self._step)
        self.is_overrun = self._num_made - self._num_taken > MAX_PENDING
        self._steps.append(self._step)
        self._step = []
        self._wake()


def _ended(request_id: str, why: str) -> StepOutput:
    return StepOutput(request_id, (), finish_reason=FinishReason.ERROR, stop_reason=why)


def _checked(submission: Submission, limits: TokenLimits) -> Submission:
    """The submission, if the loop can run it. Raises RequestError."""
    if not submission.request_id:
        raise RequestError("request_id is empty; give each request its own", field="request_id")
    params = check_token_request(submission.prompt_token_ids, submission.params, limits)
    _check_ids("output_token_ids", submission.output_token_ids, limits)
    for word in submission.bad_words:
        if not word:
            raise RequestError("a bad word has no tokens; leave it out", field="bad_words")
        _check_ids("bad_words", word, limits)
    return replace(submission, params=params)


def _check_ids(field: str, token_ids: tuple[int, ...], limits: TokenLimits) -> None:
    if token_ids and max(token_ids) >= limits.logits_width:
        raise RequestError(
            f"{field} has the token id {max(token_ids)}, but this model's token ids are 0 to "
            f"{limits.logits_width - 1}; was it made with another tokenizer?",
            field=field,
        )


def _logprob_bytes(output: StepOutput) -> int:
    """About what the logprobs take on the wire: an id and a number for each of the most likely."""
    positions = (*output.logprobs, *(output.prompt_logprobs or ()))
    return sum(24 + 8 * len(position.top_ids) for position in positions)
