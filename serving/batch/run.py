"""One run: lines are read as the engine has room for them, results written as they are finished.

Memory holds one line of the input and a window of requests, however long the input is; results
that wait for their turn count to the window. The engine is started when the first line needs it.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

from ...engine.errors import ConfigError, EngineError, EngineStopped, RequestError
from ...engine.sampling_params import SamplingParams
from .interrupts import Interrupts
from .line_request import LineRequest
from .progress import Progress
from .result_file import BatchStopped, ResultFile
from .result_line import Origin, Result, answered, refused
from .result_order import AsFinished, InOrder
from .unfinished import UnfinishedLine, UnfinishedLines

if TYPE_CHECKING:
    from ...engine.llm import LLM
    from ...engine.open_requests import OpenRequests
    from ...engine.outputs import RequestOutput
    from ...engine.text.validate import TextRequest

Start = Callable[[], AbstractContextManager["LLM"]]

# Enough that a slot never waits for the reader, few enough to be held in memory.
_WINDOW_PER_SLOT = 4
_WAIT_S = 0.2  # how late an interrupt, or a line from a slow pipe, may be noticed
_SYNC_EVERY_S = 1.0


@dataclasses.dataclass(frozen=True)
class _Asked:
    origin: Origin
    request: LineRequest


class BatchRun:
    """Owns what is under way between an input and an output."""

    def __init__(
        self,
        lines: UnfinishedLines,
        results: ResultFile,
        progress: Progress,
        *,
        sampling: Mapping[str, Any],
        is_ordered: bool,
    ) -> None:
        """sampling: for fields that a line does not set."""
        self._lines = lines
        self._results = results
        self._progress = progress
        self._sampling = sampling
        self._is_ordered = is_ordered
        self._order = InOrder(self._write) if is_ordered else AsFinished(self._write)
        self._interrupts = Interrupts()
        self._llm: LLM | None = None
        self._open: OpenRequests | None = None
        self._asked_by_id: dict[str, _Asked] = {}
        self._synced_s = time.monotonic()

    def run(self, start: Start) -> int | None:
        """Until the input is at its end and all is written, or until a signal that leaves work
        undone: then its exit code.

        Raises ConfigError when the output belongs to another input, and BatchStopped.
        """
        if self._is_ordered and not self._results.finished.is_in_order:
            raise self._cannot_be_ordered("was not written in order")
        with ExitStack() as stack, self._interrupts:
            try:
                with self._interrupts.raised(), self._reading():
                    self._lines.check_file()
                while self._is_unfinished():
                    if self._interrupts.signal is not None:
                        return self._interrupts.exit_code
                    self._step(start, stack)
            except KeyboardInterrupt:
                if self._interrupts.signal is None:
                    raise
                return self._interrupts.exit_code
            except EngineError as error:
                raise self._stopped(_failure(error)) from error
            finally:
                self._results.sync()
        return None

    def _is_unfinished(self) -> bool:
        if self._asked_by_id:
            return True
        if self._interrupts.signal is not None:  # the last line may have been read a moment ago
            with self._reading():
                self._lines.look_for_end()
        return not self._lines.is_at_end

    def _step(self, start: Start, stack: ExitStack) -> None:
        """One line or one answer, whichever can be had; a short wait if neither can."""
        is_moving = False
        if self._has_room() and not self._lines.is_at_end:
            with self._reading():
                is_moving = self._lines.read(0.0 if self._asked_by_id else _WAIT_S)
            line = self._lines.take()
            if line is not None:
                self._admit(line, start, stack)
        if self._open is not None:
            output = self._open.take(0.0 if is_moving else _WAIT_S)
            if output is not None:
                self._finish(output)
            self._progress.tick(self._open.num_tokens)
        if time.monotonic() - self._synced_s > _SYNC_EVERY_S:
            self._results.sync()
            self._synced_s = time.monotonic()

    def _has_room(self) -> bool:
        if self._llm is None or self._open is None:
            return True
        num_held = self._open.num_open + self._order.num_held
        return num_held < _WINDOW_PER_SLOT * self._llm.max_num_seqs

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._stopped(f"cannot read the input: {error.strerror}") from error

    def _admit(self, line: UnfinishedLine, start: Start, stack: ExitStack) -> None:
        read, claim = line.read, line.claim
        if self._is_ordered and claim.origin.index < self._results.finished.last_index:
            raise self._cannot_be_ordered(
                f"has no result of line {claim.origin.line} in the middle, and has later ones"
            )
        self._order.expect(claim.origin.index)
        if isinstance(read.asked, RequestError):
            self._refuse(claim.origin, read.asked)
        elif claim.first_line is not None:
            first = f"line {claim.first_line} has the {read.id_field} {claim.wanted!r:.80} already"
            error = RequestError(f"{first}; give each line its own", field=read.id_field)
            self._refuse(claim.origin, error)
        else:
            self._submit(_Asked(claim.origin, read.asked), self._engine(start, stack))

    def _engine(self, start: Start, stack: ExitStack) -> "LLM":
        if self._llm is None:
            with self._interrupts.raised():
                self._llm = stack.enter_context(start())
            self._open = stack.enter_context(self._llm.open_requests())
            self._progress.start_clock()
        return self._llm

    def _submit(self, asked: _Asked, llm: "LLM") -> None:
        assert self._open is not None
        try:
            request = _checked(asked, self._sampling, llm)
        except EngineError:
            raise
        except Exception as error:
            # The border of a line: whatever it does to us, the others go on.
            self._refuse(asked.origin, _respelled(error, asked.request))
            return
        (request_id,) = self._open.submit([request])
        self._asked_by_id[request_id] = asked

    def _finish(self, output: "RequestOutput") -> None:
        assert self._open is not None
        asked = self._asked_by_id.pop(output.request_id)
        if any(answer.finish_reason == "error" for answer in output.outputs):
            self._open.require_engine()  # if it died, the line is not done
        result = answered(asked.origin, output, asked.request.echo)
        self._order.put(asked.origin.index, result)

    def _refuse(self, origin: Origin, error: Exception) -> None:
        self._order.put(origin.index, refused(origin, error))

    def _write(self, result: Result) -> None:
        self._results.append(result, lambda: self._interrupts.signal is not None)
        self._progress.finish(result.usage, is_error=result.is_error)

    def _cannot_be_ordered(self, reason: str) -> ConfigError:
        return ConfigError(
            f"{self._results.name} {reason}, so --ordered cannot go on with it; leave --ordered "
            "out and sort by index afterwards, or give another --output"
        )

    def _stopped(self, reason: str) -> BatchStopped:
        num_complete, go_on = self._results.num_complete, self._results.go_on
        return BatchStopped(f"{reason}; {num_complete} results are complete{go_on}")


def _failure(error: EngineError) -> str:
    """Without the advice to make a new engine, which is for the library's callers."""
    if not isinstance(error, EngineStopped):
        return str(error)
    cause = error.__cause__
    return "the engine was closed" if cause is None else f"the engine has failed ({cause})"


def _checked(asked: _Asked, sampling: Mapping[str, Any], llm: "LLM") -> "TextRequest":
    """Ready to be submitted. Raises RequestError."""
    request = asked.request
    values = {**llm.default_sampling, **request.defaults, **sampling, **request.sampling}
    params = SamplingParams(**values)
    if params.seed is None:
        # By the line, not by how many ran before it: a run that was resumed gives the same answer.
        params = dataclasses.replace(params, seed=llm.seed_of(asked.origin.index))
    if request.prompt is not None:
        return llm.check(request.prompt, params)
    return llm.check_chat(
        request.messages, params, tools=request.tools, **request.chat_template_kwargs
    )


def _respelled(error: Exception, request: LineRequest) -> Exception:
    """The error in the line's words."""
    field = error.field if isinstance(error, RequestError) else None
    if field is None or field not in request.spelled:
        return error
    name = request.spelled[field]
    return RequestError(str(error).replace(field, name, 1), field=name)
