"""One answer, read from the outputs of its steps: the same for LLM and for the gateway."""

from dataclasses import dataclass

from .core_io import PositionLogprobs, StepOutput
from .request import FinishReason
from .text.assembler import TextAssembler
from .text.tokenizer import Tokenizer
from .text.validate import TextRequest


@dataclass(slots=True)
class Piece:
    """What one output brings the reader of an answer. Without a finish_reason there is more."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    must_abort: bool = False  # a stop string ended the answer, and the core does not know


class AnswerReader:
    """Text, stop strings and the end of one choice. After the last piece nothing is to be read."""

    __slots__ = ("_assembler",)

    def __init__(self, tokenizer: Tokenizer, request: TextRequest) -> None:
        self._assembler = TextAssembler(tokenizer, request.prompt_token_ids, request.params)

    def read(self, output: StepOutput) -> Piece:
        """Tokens after a stop string's last one are left out."""
        reason, assembler = output.finish_reason, self._assembler
        is_stop_token = reason is FinishReason.STOP
        num_tokens = len(output.token_ids)
        text = ""
        for number, token_id in enumerate(output.token_ids, 1):
            is_last = reason is not None and number == num_tokens
            text += assembler.push(token_id, is_last=is_last, is_stop_token=is_stop_token)
            if assembler.matched is not None:
                return Piece(
                    text,
                    output.token_ids[:number],
                    output.logprobs[:number],
                    FinishReason.STOP,
                    assembler.matched,
                    reason is None,
                )
        if reason is not None and not num_tokens:
            text = assembler.flush()
        return Piece(text, output.token_ids, output.logprobs, reason, output.stop_reason)
