"""One Session call: many requests over one stream, each in the name of its own caller.

A message of its client concerns one id; whatever is wrong with it, the others go on.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from ...engine.errors import AuthenticationError, DeadlinePassed, QuireError, RequestError
from ...protos.quire.v1 import inference_pb2
from .callers import Caller, Callers
from .intake import Intake
from .open_request import OpenRequest
from .outbox import Lane, Outbox
from .statuses import internal_error

# Of what belongs to no request.
_NO_ID = 0


@dataclass
class _Entry:
    """One id: being opened, or open."""

    opening: asyncio.Task[None]
    request: OpenRequest | None = None
    deadline: asyncio.TimerHandle | None = None


class Session:
    """Takes the messages of one client; what comes of them waits in `outbox`."""

    def __init__(
        self,
        intake: Intake,
        callers: Callers,
        caller: Caller,
        fail: Callable[[OpenRequest, QuireError], None],
    ) -> None:
        """caller: whoever opened the stream. fail: ends a request with an error."""
        self._intake = intake
        self._callers = callers
        self._caller = caller
        self._fail = fail
        self._entries: dict[int, _Entry] = {}
        self._is_reading = True
        self.was_ended = False  # by end(), while the client could still have asked for more
        self.outbox = Outbox()

    @property
    def is_over(self) -> bool:
        """The client has said all and heard all."""
        return not self._is_reading and not self._entries and self.outbox.is_empty

    async def read(self, messages: AsyncIterator[inference_pb2.SessionRequest]) -> None:
        """Until the client ends its side."""
        try:
            async for message in messages:
                if not self._is_reading:
                    return
                kind = message.WhichOneof("message")
                if kind == "submit":
                    self._submit(message.submit)
                elif kind == "cancel":
                    self._forget(message.cancel.id)
                else:
                    error = RequestError("message is not set; send submit or cancel")
                    self._end(_NO_ID, error)
        except RequestError as error:  # a message that cannot be decoded: none after it is safe
            self._end(_NO_ID, error)
        finally:
            self._is_reading = False
            self.outbox.wake()

    def end(self) -> None:
        """Take nothing more; what is waiting in the outbox is still to be written."""
        self.was_ended = self._is_reading
        self.close()
        self._is_reading = False
        self.outbox.wake()

    def close(self) -> None:
        """End what is still open."""
        for session_id in list(self._entries):
            self._forget(session_id)

    def _submit(self, submit: inference_pb2.SessionSubmit) -> None:
        session_id = submit.id
        if session_id == _NO_ID:
            self._end(_NO_ID, RequestError("id is 0; give each request one from 1 on", field="id"))
            return
        if session_id in self._entries:
            self._forget(session_id)
            error = RequestError(
                f"the id {session_id} was submitted again while it was open, so both requests are "
                "ended; give each request of a stream its own",
                field="id",
            )
            self._end(session_id, error)
            return
        entry = _Entry(asyncio.create_task(self._open(submit)))
        self._entries[session_id] = entry
        if submit.timeout_ns > 0:
            loop = asyncio.get_running_loop()
            # The timer does not take more than some years.
            timeout_s = min(submit.timeout_ns * 1e-9, 1e7)
            entry.deadline = loop.call_later(timeout_s, self._on_deadline, session_id)

    async def _open(self, submit: inference_pb2.SessionSubmit) -> None:
        session_id = submit.id
        lane = Lane(self.outbox, session_id, self._fail, self._on_done)
        try:
            message = _asked(submit)
            caller = self._caller
            if submit.bearer_key:
                caller = self._callers.of_key(submit.bearer_key)
            request = await self._intake.open(message, caller, lane)
        except QuireError as error:
            if isinstance(error, AuthenticationError):
                self._intake.note_unauthenticated()
            self._end(session_id, error)
        except Exception as error:
            # The border of a request: whatever one shows to be broken, the others go on.
            self._end(session_id, internal_error(error))
        else:
            entry = self._entries.get(session_id)
            if entry is not None:  # it may have been aborted while it was prepared
                entry.request = request

    def _end(self, session_id: int, error: QuireError) -> None:
        """Of an id that has no open request."""
        Lane(self.outbox, session_id, self._fail, self._on_done).refuse(error)

    def _on_done(self, session_id: int) -> None:
        entry = self._entries.pop(session_id, None)
        if entry is None:
            return
        if entry.deadline is not None:
            entry.deadline.cancel()
        if entry.request is not None:
            # Not at once: whoever brings its last piece is not done with it.
            asyncio.get_running_loop().call_soon(self._intake.cancel, entry.request)

    def _on_deadline(self, session_id: int) -> None:
        entry = self._entries.get(session_id)
        if entry is None:
            return
        error = DeadlinePassed("the request was not done within its timeout_ns")
        if entry.request is not None:
            self._fail(entry.request, error)
        else:
            entry.opening.cancel()
            self._end(session_id, error)

    def _forget(self, session_id: int) -> None:
        """End it without a word: its client has gone, or does not want to hear more of it."""
        entry = self._entries.get(session_id)
        if entry is None:
            return
        self._on_done(session_id)
        entry.opening.cancel()
        if entry.request is not None:
            self._intake.cancel(entry.request)


def _asked(
    submit: inference_pb2.SessionSubmit,
) -> inference_pb2.GenerateRequest | inference_pb2.ChatRequest:
    if submit.timeout_ns < 0:
        raise RequestError(
            f"timeout_ns is {submit.timeout_ns}, but must be 0 (none) or more", field="timeout_ns"
        )
    kind = submit.WhichOneof("request")
    if kind is None:
        raise RequestError("request is not set; send generate or chat", field="request")
    return submit.generate if kind == "generate" else submit.chat


async def write_all(session: Session, context: Any, write_timeout_s: float) -> None:
    """Until both sides have said all. Raises TimeoutError when the client does not read."""
    while not session.is_over:
        response = await session.outbox.take()
        if response.events:
            async with asyncio.timeout(write_timeout_s):
                await context.write(response)
