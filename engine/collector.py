"""Puts the answers to one prompt together from the outputs of its choices."""

from dataclasses import dataclass, field

from .answer_reader import AnswerReader
from .core_io import StepOutput
from .errors import EngineStopped
from .outputs import CompletionOutput, LogprobsAtPosition, RequestOutput, StreamDelta
from .request import FinishReason
from .text.logprobs import logprobs_at
from .text.tokenizer import Tokenizer
from .text.validate import TextRequest


@dataclass(frozen=True)
class Mark:
    num_characters: int
    num_tokens: int


@dataclass
class Collector:
    """Puts the answers to one prompt together."""

    number: int
    request: TextRequest
    tokenizer: Tokenizer
    answers: list[CompletionOutput] = field(init=False)
    prompt_logprobs: list[LogprobsAtPosition | None] | None = None
    num_cached: int = 0

    def __post_init__(self) -> None:
        params = self.request.params
        self.answers = [CompletionOutput(index=i) for i in range(params.n)]
        self._readers = [AnswerReader(self.tokenizer, self.request) for _ in range(params.n)]
        if params.logprobs is not None:
            for answer in self.answers:
                answer.logprobs, answer.cumulative_logprob = [], 0.0

    @property
    def is_done(self) -> bool:
        return all(answer.finished() for answer in self.answers)

    def add(self, output: StepOutput, choice: int) -> tuple[bool, bool]:
        """Take one output. Returns whether the answer is complete, and whether the core must be
        told so.
        """
        answer = self.answers[choice]
        self.num_cached = output.num_cached or self.num_cached
        if output.prompt_logprobs is not None and self.prompt_logprobs is None:
            self.prompt_logprobs = [
                None, *(logprobs_at(p, self.tokenizer) for p in output.prompt_logprobs)
            ]  # fmt: skip
        piece = self._readers[choice].read(output)
        answer.text += piece.text
        answer.token_ids += piece.token_ids
        if answer.logprobs is not None and answer.cumulative_logprob is not None:
            for position in piece.logprobs:
                answer.logprobs.append(logprobs_at(position, self.tokenizer))
                answer.cumulative_logprob += position.logprob
        if piece.finish_reason is None:
            return False, False
        answer.finish_reason, answer.stop_reason = piece.finish_reason.value, piece.stop_reason
        if piece.finish_reason is FinishReason.ABORT:
            raise EngineStopped("the engine was closed while the request was under way")
        return True, piece.must_abort

    def mark(self, choice: int) -> Mark:
        answer = self.answers[choice]
        return Mark(len(answer.text), len(answer.token_ids))

    def delta_since(self, mark: Mark, choice: int) -> StreamDelta:
        answer = self.answers[choice]
        return StreamDelta(
            text=answer.text[mark.num_characters :],
            token_ids=answer.token_ids[mark.num_tokens :],
            index=choice,
            logprobs=None if answer.logprobs is None else answer.logprobs[mark.num_tokens :],
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop_reason,
        )

    def result(self) -> RequestOutput:
        return RequestOutput(
            request_id=str(self.number),
            prompt=self.request.prompt,
            prompt_token_ids=list(self.request.prompt_token_ids),
            prompt_logprobs=self.prompt_logprobs,
            outputs=self.answers,
            num_cached_tokens=self.num_cached,
        )
