"""A request that was accepted, from its submission to its last piece.

It holds all that is needed to go on in another core: prompt, parameters, and the tokens so far. Who
reads its pieces is a sink; how they reach a client is the sink's.
"""

import time
from dataclasses import dataclass, field
from typing import Protocol

from ...engine.answer_reader import AnswerReader, Piece
from ...engine.core_io import StepOutput, Submission
from ...engine.errors import QuireError
from ...engine.text.tokenizer import Tokenizer
from ...engine.text.validate import TextRequest
from ...protos.quire.v1 import inference_pb2
from .waiting import Place


class Sink(Protocol):
    """Takes what comes of a request, in order; neither waits nor raises."""

    def on_piece(self, choice: "Choice", piece: Piece) -> None:
        """What one output brought a choice."""

    def on_error(self, request: "OpenRequest", error: QuireError) -> None:
        """The request ended without the last piece of some of its choices."""


@dataclass(frozen=True)
class Terms:
    """What a request is run with beside its text: who asked, and what follows from it."""

    request_id: str
    model: str
    tenant: bytes
    cache_salt: bytes
    priority: int
    seed: int


class Choice:
    """One of the n answers: a request of its own to the core."""

    __slots__ = ("core_id", "index", "is_done", "reader", "request", "token_ids")

    def __init__(self, request: "OpenRequest", index: int, core_id: str, reader: AnswerReader):
        self.request = request
        self.index = index
        self.core_id = core_id
        self.reader = reader
        self.token_ids: list[int] = []
        self.is_done = False

    def submission(self) -> Submission:
        """To start it, or to go on after the tokens it has."""
        request, terms = self.request, self.request.terms
        return Submission(
            self.core_id,
            request.text.prompt_token_ids,
            request.text.params,
            terms.seed,
            request.text.bad_word_ids,
            self.index,
            terms.priority,
            terms.cache_salt,
            tuple(self.token_ids),
            tenant=terms.tenant,
        )


@dataclass
class Times:
    """time.monotonic_ns() of what happened; 0 is not yet."""

    arrived: int = field(default_factory=time.monotonic_ns)
    submitted: int = 0
    admitted: int = 0
    first_token: int = 0
    last_token: int = 0
    ended: int = 0


class OpenRequest:
    """One request and its choices."""

    def __init__(
        self,
        number: int,
        text: TextRequest,
        terms: Terms,
        place: Place,
        tokenizer: Tokenizer,
        sink: Sink,
    ) -> None:
        """number: unique in this process; the core's ids are made of it. place: left when the
        first token comes, or the end.
        """
        self.text = text
        self.terms = terms
        self.place = place
        self.tokenizer = tokenizer
        self.sink = sink
        self.times = Times()
        self.choices = [
            Choice(self, index, f"{number:x}.{index}", AnswerReader(tokenizer, text))
            for index in range(text.params.n)
        ]
        self.num_open = len(self.choices)
        self.num_cached = 0
        self.was_sent = False  # to a core, of whichever there was
        self.num_resumes = 0
        self.ended_by = "abort"  # how it counts, unless its last piece says otherwise
        # Until the first piece that is sent takes them.
        self.prompt_logprobs: inference_pb2.PromptLogprobs | None = None
        self.has_told_prompt_logprobs = False
        # What comes while they are made into a message, which takes a tenth of a second and more.
        self.held: list[tuple[Choice, StepOutput, int]] | None = None

    @property
    def is_done(self) -> bool:
        return self.num_open == 0

    @property
    def num_output_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices)

    def take_prompt_logprobs(self) -> inference_pb2.PromptLogprobs | None:
        """Once, when they are known and were asked for."""
        given, self.prompt_logprobs = self.prompt_logprobs, None
        return given
