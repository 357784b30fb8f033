"""What waits for one reader: deltas of his requests, merged while he is slow, and given up when he
does not read at all.

The step loop never waits for a reader: pieces go in at once, whatever becomes of them.
"""

import asyncio
from collections.abc import Callable

from ...engine.answer_reader import Piece
from ...engine.errors import QuireError, SlowReader
from ...protos.quire.v1 import inference_pb2
from .answers import add_piece
from .open_request import Choice, OpenRequest
from .statuses import session_error

# Of one request, not read: what comes after that ends it.
MAX_WAITING_BYTES = 256 << 10
# A message that the reader does not take in this time ends his call.
WRITE_TIMEOUT_S = 30.0
# Deltas are merged into texts of about so many characters: longer ones would be copied too often.
_MERGED_CHARACTERS = 4096
# Of a token id, a logprob with its text, and a piece beside its text, on the wire, about.
_TOKEN_BYTES, _LOGPROB_BYTES, _PIECE_BYTES = 4, 24, 16


class Outbox:
    """Events of one session, or of one call."""

    def __init__(self) -> None:
        self._events = inference_pb2.SessionResponse()
        self._is_filled = asyncio.Event()
        self._is_awaited = False
        self.num_taken = 0

    @property
    def is_empty(self) -> bool:
        return not self._events.events

    @property
    def is_heard(self) -> bool:
        """Nothing waits, and what was taken is written: its taker is back for more."""
        return self._is_awaited and self.is_empty

    def add(self) -> inference_pb2.SessionEvent:
        """A new event, to be filled before anything else runs."""
        self._is_filled.set()
        event: inference_pb2.SessionEvent = self._events.events.add()
        return event

    def wake(self) -> None:
        """Let take() return, also with nothing."""
        self._is_filled.set()

    async def take(self) -> inference_pb2.SessionResponse:
        """All that waits, once there is something or wake() was called."""
        self._is_awaited = True
        await self._is_filled.wait()
        self._is_awaited = False
        self._is_filled.clear()
        taken, self._events = self._events, inference_pb2.SessionResponse()
        self.num_taken += 1
        return taken


class Lane:
    """The sink of one request, into an outbox that it shares with others."""

    def __init__(
        self,
        outbox: Outbox,
        session_id: int,
        on_slow: Callable[[OpenRequest, QuireError], None],
        on_done: Callable[[int], None] = lambda _: None,
    ) -> None:
        """on_slow: ends the request with an error; called when nobody is at it. on_done: called
        with the session's id behind the last event.
        """
        self._outbox = outbox
        self._id = session_id
        self._on_slow = on_slow
        self._on_done = on_done
        self._num_taken = -1
        self._num_bytes = 0
        self._is_given_up = False
        self._named: set[int] = set()
        # By index of the choice: the delta that waits, to be merged with.
        self._waiting: dict[int, inference_pb2.GenerateDelta] = {}
        self.error: QuireError | None = None

    def on_piece(self, choice: Choice, piece: Piece) -> None:
        """Put it behind what waits of the same choice."""
        is_done = choice.request.is_done
        if self._is_given_up:
            if is_done:  # before it could be ended for that
                self.refuse(_too_slow())
            return
        if self._num_taken != self._outbox.num_taken:
            self._num_taken = self._outbox.num_taken
            self._num_bytes = 0
            self._waiting.clear()
        elif self._num_bytes > MAX_WAITING_BYTES and not is_done:
            self._is_given_up = True
            # Not at once: whoever brings this piece is not done with the request.
            loop = asyncio.get_running_loop()
            loop.call_soon(self._on_slow, choice.request, _too_slow())
            return
        delta = self._waiting.get(choice.index)
        # Those of other answers may stand behind the one that waits, and the summary comes last.
        is_last_of_several = is_done and len(self._waiting) > 1
        if delta is None or len(delta.text) > _MERGED_CHARACTERS or is_last_of_several:
            delta = self._new_delta(choice)
        add_piece(delta, choice, piece)
        self._num_bytes += len(piece.text) + _PIECE_BYTES + _TOKEN_BYTES * len(piece.token_ids)
        for position in piece.logprobs:
            self._num_bytes += _LOGPROB_BYTES * (1 + len(position.top_ids))
        if is_done:
            self._on_done(self._id)

    def on_error(self, _: OpenRequest, error: QuireError) -> None:
        self.refuse(error)

    def refuse(self, error: QuireError) -> None:
        """The only event, or the last one."""
        self.error = error
        event = self._outbox.add()
        event.id = self._id
        event.error.CopyFrom(session_error(error))
        self._on_done(self._id)

    def _new_delta(self, choice: Choice) -> inference_pb2.GenerateDelta:
        event = self._outbox.add()
        if self._id:
            event.id = self._id
        delta = self._waiting[choice.index] = event.delta
        if choice.index:
            delta.index = choice.index
        if choice.index not in self._named:
            self._named.add(choice.index)
            delta.request_id = choice.request.terms.request_id
            delta.prompt_tokens = len(choice.request.text.prompt_token_ids)
        return delta


def _too_slow() -> SlowReader:
    return SlowReader(
        f"more than {MAX_WAITING_BYTES >> 10} KiB of the answer were not read; read faster, or ask "
        "for less"
    )
