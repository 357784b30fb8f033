"""The thread that drives an EngineCore for callers in the same process.

Callers submit and abort from any thread; each StepOutput goes to the sink its request came with, on
this thread. Idle, it sleeps.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .core import EngineCore
from .core_io import StepOutput, Submission
from .errors import EngineStopped, UsageError
from .request import FinishReason

logger = logging.getLogger(__name__)

Sink = Callable[[StepOutput], None]


@dataclass(frozen=True)
class LoopStatus:
    """has_work: requests are queued, waiting, running or in flight. step_age_ns: since the last
    step ended, or since work came to an idle loop; 0 without work.
    """

    has_work: bool
    step_age_ns: int


class EngineLoop:
    """Owns the core once started; nothing else may touch it."""

    def __init__(self, core: EngineCore, after_step: Callable[[], None] = lambda: None) -> None:
        """after_step: called on the loop's thread when the outputs of a step have gone to their
        sinks; it must neither wait nor raise.
        """
        self._core = core
        self._after_step = after_step
        self._moved_ns = 0
        self._wake = threading.Condition()
        self._inbox: deque[tuple[Submission, Sink] | str] = deque()
        self._sinks: dict[str, Sink] = {}
        self._is_closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="quire-step-loop", daemon=True)
        self._thread.start()

    def submit(self, submissions: Iterable[Submission], sink: Sink) -> None:
        """Queue requests; their outputs go to `sink`. Raises EngineStopped after close()."""
        with self._wake:
            self._require_open()
            self._note_arrival()
            self._inbox.extend((s, sink) for s in submissions)
            self._wake.notify()

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests; nothing more comes of them. Unknown ids are ignored."""
        with self._wake:
            self._note_arrival()
            self._inbox.extend(request_ids)
            self._wake.notify()

    @property
    def failure(self) -> BaseException | None:
        """What ended the loop, if it was not close()."""
        return self._failure

    def status(self) -> LoopStatus:
        """Whether the loop moves; answers from any thread while a step is stuck."""
        if not self._has_work():
            return LoopStatus(False, 0)
        return LoopStatus(True, time.monotonic_ns() - self._moved_ns)

    def close(self) -> None:
        """Stop after the step under way. Requests still running end with `abort`."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _has_work(self) -> bool:
        return bool(self._inbox) or self._core.has_work

    def _note_arrival(self) -> None:
        if not self._has_work():
            self._moved_ns = time.monotonic_ns()

    def _require_open(self) -> None:
        if self._failure is not None:
            raise EngineStopped(
                f"the engine has failed ({self._failure}); make a new one"
            ) from self._failure
        if self._is_closing:
            raise EngineStopped("the engine was closed; make a new one")

    def _run(self) -> None:
        try:
            while self._take_commands():
                for output in self._core.step():
                    self._deliver(output)
                self._moved_ns = time.monotonic_ns()
                self._after_step()
        except BaseException as error:
            # Nobody else would see it: a thread's exception ends only the thread.
            logger.exception("the step loop failed")
            self._failure = error
        finally:
            with self._wake:
                self._is_closing = True
                for command in self._inbox:
                    if not isinstance(command, str):
                        self._sinks[command[0].request_id] = command[1]
                self._inbox.clear()
            for output in self._core.take_outputs():
                self._deliver(output)  # read before the failure: these stand
            why = str(self._failure) if self._failure else None
            reason = FinishReason.ABORT if self._failure is None else FinishReason.ERROR
            for request_id in list(self._sinks):
                self._deliver(_ended(request_id, reason, why))
            self._after_step()

    def _take_commands(self) -> bool:
        """Apply what came in; sleep while there is nothing to do. False when closing."""
        with self._wake:
            while not (self._inbox or self._core.has_work or self._is_closing):
                self._wake.wait()
        while True:
            # One at a time, and its sink known before it is out of the inbox: whatever happens in
            # between, the caller gets an end.
            with self._wake:
                if self._is_closing:
                    return False
                if not self._inbox:
                    return True
                command = self._inbox.popleft()
                if isinstance(command, str):
                    self._sinks.pop(command, None)
                    request_id, is_new = command, False
                else:
                    request_id = command[0].request_id
                    is_new = request_id not in self._sinks
                    self._sinks.setdefault(request_id, command[1])
            if isinstance(command, str):
                self._core.abort(request_id)
            elif is_new:
                self._submit(command[0])
            else:
                why = f"the request id {request_id!r} is in use; give each request its own"
                command[1](_ended(request_id, FinishReason.ERROR, why))

    def _submit(self, submission: Submission) -> None:
        try:
            self._core.submit(submission)
        except UsageError as error:
            self._deliver(_ended(submission.request_id, FinishReason.ERROR, str(error)))
        except Exception:
            # The border of a request: a fault of ours that one submission shows ends only that one.
            logger.exception("request %s could not be queued", submission.request_id)
            why = "the engine failed to queue the request; its log says why"
            self._deliver(_ended(submission.request_id, FinishReason.ERROR, why))

    def _deliver(self, output: StepOutput) -> None:
        if output.finish_reason is None:
            sink = self._sinks.get(output.request_id)
        else:
            sink = self._sinks.pop(output.request_id, None)
        if sink is not None:
            sink(output)


def _ended(request_id: str, reason: FinishReason, why: str | None) -> StepOutput:
    return StepOutput(request_id, (), finish_reason=reason, stop_reason=why)
