"""Puts the answers to one prompt together from the outputs of its choices."""

from dataclasses import dataclass, field

from .core_io import StepOutput
from .errors import EngineStopped
from .outputs import CompletionOutput, LogprobsAtPosition, RequestOutput, StreamDelta
from .request import FinishReason
from .text.assembler import TextAssembler
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
        self._assemblers = [
            TextAssembler(self.tokenizer, self.request.prompt_token_ids, params)
            for _ in range(params.n)
        ]
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
        answer, assembler = self.answers[choice], self._assemblers[choice]
        self.num_cached = output.num_cached or self.num_cached
        if output.prompt_logprobs is not None and self.prompt_logprobs is None:
            self.prompt_logprobs = [
                None, *(logprobs_at(p, self.tokenizer) for p in output.prompt_logprobs)
            ]  # fmt: skip
        is_last = output.finish_reason is not None
        is_stop = output.finish_reason is FinishReason.STOP
        matched = None
        for token_id in output.token_ids:
            answer.token_ids.append(token_id)
            delta = assembler.push(token_id, is_last=is_last, is_stop_token=is_stop)
            answer.text += delta.text
            matched = delta.matched
        if answer.logprobs is not None and answer.cumulative_logprob is not None:
            for position in output.logprobs:
                answer.logprobs.append(logprobs_at(position, self.tokenizer))
                answer.cumulative_logprob += position.logprob
        if matched is not None:
            answer.finish_reason, answer.stop_reason = FinishReason.STOP.value, matched
            return True, not is_last
        if output.finish_reason is not None:
            if not output.token_ids:
                answer.text += assembler.flush().text
            answer.finish_reason, answer.stop_reason = (
                output.finish_reason.value,
                output.stop_reason,
            )
            if output.finish_reason is FinishReason.ABORT:
                raise EngineStopped("the engine was closed while the request was under way")
        return is_last, False

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
