"""Pieces of answers as messages of quire.v1."""

from collections.abc import Iterable

from ...engine.answer_reader import Piece
from ...engine.core_io import PositionLogprobs
from ...engine.request import FinishReason
from ...engine.text.logprobs import logprobs_at
from ...engine.text.tokenizer import Tokenizer
from ...protos.quire.v1 import inference_pb2
from .open_request import Choice, OpenRequest

_WIRE_BY_REASON = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: inference_pb2.FINISH_REASON_ABORT,
    FinishReason.ERROR: inference_pb2.FINISH_REASON_ERROR,
}


def add_piece(delta: inference_pb2.GenerateDelta, choice: Choice, piece: Piece) -> None:
    """Put a piece behind what the delta of the same choice has."""
    if piece.text:
        delta.text += piece.text
    delta.token_ids.extend(piece.token_ids)
    request = choice.request
    if piece.logprobs:
        delta.logprobs.extend(_positions(piece.logprobs, request.tokenizer))
    told = request.take_prompt_logprobs()
    if told is not None:
        delta.prompt_logprobs.CopyFrom(told)
    if piece.finish_reason is not None:
        set_finish(delta, piece)
        if request.is_done:
            set_summary(delta.summary, request)


def set_finish(
    message: inference_pb2.GenerateDelta | inference_pb2.Completion, piece: Piece
) -> None:
    assert piece.finish_reason is not None
    message.finish_reason = _WIRE_BY_REASON[piece.finish_reason]
    if isinstance(piece.stop_reason, int):
        message.stop_reason.token_id = piece.stop_reason
    elif piece.stop_reason is not None:
        message.stop_reason.text = piece.stop_reason


def set_summary(summary: inference_pb2.Summary, request: OpenRequest) -> None:
    times = request.times
    summary.usage.prompt_tokens = len(request.text.prompt_token_ids)
    summary.usage.completion_tokens = request.num_output_tokens
    summary.usage.cached_tokens = request.num_cached
    summary.timing.queue_ns = max(0, (times.admitted or times.ended) - times.arrived)
    summary.timing.first_token_ns = max(0, times.first_token - times.arrived)
    summary.timing.total_ns = max(0, times.ended - times.arrived)
    summary.seed = request.terms.seed
    summary.resumed = request.num_resumes > 0


class Completed:
    """One answer, put together as its pieces come: all at once it would keep others waiting."""

    def __init__(self, choice: Choice) -> None:
        # Not the choice: its request has this answer, and would be freed by the collector alone.
        self._tokenizer = choice.request.tokenizer
        self._texts: list[str] = []
        self._has_logprobs = choice.request.text.params.logprobs is not None
        self._cumulative = 0.0
        self._message = inference_pb2.Completion(index=choice.index)

    def add(self, piece: Piece) -> None:
        self._texts.append(piece.text)
        self._message.token_ids.extend(piece.token_ids)
        if piece.logprobs:
            self._message.logprobs.extend(_positions(piece.logprobs, self._tokenizer))
            self._cumulative += sum(position.logprob for position in piece.logprobs)
        if piece.finish_reason is not None:
            set_finish(self._message, piece)

    def message(self) -> inference_pb2.Completion:
        """The whole of it, after its last piece."""
        self._message.text = "".join(self._texts)
        if self._has_logprobs:
            self._message.cumulative_logprob = self._cumulative
        return self._message


def prompt_logprobs(
    positions: Iterable[PositionLogprobs], tokenizer: Tokenizer
) -> inference_pb2.PromptLogprobs:
    """The first position is empty, because nothing comes before it. Takes some 0.1 ms a position:
    not for an event loop.
    """
    message = inference_pb2.PromptLogprobs()
    message.positions.add()
    message.positions.extend(_positions(positions, tokenizer))
    return message


def _positions(
    positions: Iterable[PositionLogprobs], tokenizer: Tokenizer
) -> list[inference_pb2.PositionLogprobs]:
    return [
        inference_pb2.PositionLogprobs(
            tokens=[
                inference_pb2.TokenLogprob(
                    token_id=token_id, logprob=one.logprob, rank=one.rank, text=one.decoded_token
                )
                for token_id, one in logprobs_at(position, tokenizer).items()
            ]
        )
        for position in positions
    ]
