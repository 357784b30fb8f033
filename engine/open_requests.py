"""Requests that one caller has submitted and not yet taken, and each answer as it is complete.

Knows the step loop and how outputs become answers; where requests come from, how many may be open
at once, and in which order answers are wanted is the caller's.
"""

import queue
import time
from collections.abc import Callable, Iterable

from .collector import Collector
from .core_io import StepOutput, Submission
from .loop import EngineLoop
from .outputs import RequestOutput
from .text.tokenizer import Tokenizer
from .text.validate import TextRequest

# A request's number, and one submission for each of its choices.
Numbering = Callable[[TextRequest], tuple[int, list[Submission]]]


class OpenRequests:
    """Submit at any time, take answers in the order in which they finish. For one thread; get it
    from `LLM.open_requests`. Leaving the `with` ends what is still open.
    """

    def __init__(self, loop: EngineLoop, tokenizer: Tokenizer, numbered: Numbering) -> None:
        self._loop = loop
        self._tokenizer = tokenizer
        self._numbered = numbered
        self._outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        self._answer_by_id: dict[str, tuple[Collector, int]] = {}
        self._num_tokens = 0

    @property
    def num_open(self) -> int:
        """Answers still to come: a request for n choices counts n times."""
        return len(self._answer_by_id)

    @property
    def num_tokens(self) -> int:
        """Output tokens that have come so far, those of unfinished answers among them."""
        return self._num_tokens

    def submit(self, requests: Iterable[TextRequest]) -> list[str]:
        """The request ids that their RequestOutputs will carry. Raises EngineStopped."""
        request_ids: list[str] = []
        submissions: list[Submission] = []
        for request in requests:
            number, choices = self._numbered(request)
            collector = Collector(number, request, self._tokenizer)
            request_ids.append(str(number))
            submissions += choices
            self._answer_by_id |= {s.request_id: (collector, s.choice) for s in choices}
        self._loop.submit(submissions, self._outputs.put)
        return request_ids

    def take(self, timeout_s: float | None = None) -> RequestOutput | None:
        """The next request to finish; None when none is open, or none finished in time.

        Raises EngineStopped when the engine is closed meanwhile. An answer that failed has the
        finish_reason "error"; see `require_engine`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self._answer_by_id:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                output = self._outputs.get(timeout=left)
            except queue.Empty:
                return None
            finished = self._add(output)
            if finished is not None:
                return finished
        return None

    def require_engine(self) -> None:
        """Raise EngineStopped if the engine has failed: it was not one request's error then."""
        self._loop.submit((), self._outputs.put)

    def __enter__(self) -> "OpenRequests":
        return self

    def __exit__(self, *_: object) -> None:
        if self._answer_by_id:
            self._loop.abort(list(self._answer_by_id))
            self._answer_by_id.clear()

    def _add(self, output: StepOutput) -> RequestOutput | None:
        if output.request_id not in self._answer_by_id:
            return None  # the extra token of an answer that a stop string ended
        collector, choice = self._answer_by_id[output.request_id]
        self._num_tokens += len(output.token_ids)
        is_done, must_abort = collector.add(output, choice)
        if must_abort:
            self._loop.abort([output.request_id])
        if is_done:
            del self._answer_by_id[output.request_id]
        return collector.result() if is_done and collector.is_done else None
