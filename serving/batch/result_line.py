"""The results of one line as one line of JSON: an answer, or why there is none."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...engine.errors import RequestError
from ...engine.outputs import CompletionOutput, LogprobsAtPosition, RequestOutput
from .line_request import LineId

# How every result begins, so that a file of something else is recognised.
HEAD = b'{"id": '
# JSON has no infinity; vLLM's number for "never".
_LOWEST_LOGPROB = -9999.0


@dataclass(frozen=True)
class Origin:
    """Where a result comes from. line: from 1."""

    id: LineId
    line: int

    @property
    def index(self) -> int:
        return self.line - 1


@dataclass(frozen=True)
class Usage:
    """Tokens of one line, all its choices together."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class Failure:
    """Why a line has no whole answer. kind: the class of the error."""

    message: str
    kind: str
    field: str | None = None


@dataclass(frozen=True)
class Result:
    """One line of the output, without its newline."""

    content: bytes
    usage: Usage
    is_error: bool


def refused(origin: Origin, error: Exception) -> Result:
    """The result of a line that was not run."""
    field = error.field if isinstance(error, RequestError) else None
    failure = Failure(str(error), type(error).__name__, field)
    return _result(origin, [], Usage(), failure, {})


def answered(origin: Origin, output: RequestOutput, echo: Mapping[str, Any]) -> Result:
    """The result of a line that was run. An answer that the engine gave up is an error, and what
    came of it stays.
    """
    num_prompt = len(output.prompt_token_ids)
    num_completion = sum(len(answer.token_ids) for answer in output.outputs)
    usage = Usage(num_prompt, num_completion, num_prompt + num_completion, output.num_cached_tokens)
    failed = next((a for a in output.outputs if a.finish_reason == "error"), None)
    failure = None if failed is None else Failure(str(failed.stop_reason), "EngineError")
    extra = dict(echo)
    if output.prompt_logprobs is not None:
        extra["prompt_logprobs"] = [
            None if position is None else _position(position) for position in output.prompt_logprobs
        ]
    return _result(origin, [_answer(a) for a in output.outputs], usage, failure, extra)


def _result(
    origin: Origin,
    answers: list[dict[str, Any]],
    usage: Usage,
    failure: Failure | None,
    extra: Mapping[str, Any],
) -> Result:
    error = None
    if failure is not None:
        error = {
            "message": failure.message,
            "type": failure.kind,
            "field": failure.field,
            "line": origin.line,
        }
    fields = {
        "id": origin.id,
        "index": origin.index,
        "outputs": answers,
        "usage": asdict(usage),
        "error": error,
        **extra,
    }
    # Half a surrogate pair, which an id may hold, becomes the escape that JSON has for it.
    content = json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return Result(content, usage, failure is not None)


def _answer(answer: CompletionOutput) -> dict[str, Any]:
    fields = {
        "index": answer.index,
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    if answer.logprobs is not None and answer.cumulative_logprob is not None:
        fields["logprobs"] = [_position(position) for position in answer.logprobs]
        fields["cumulative_logprob"] = _finite(answer.cumulative_logprob)
    return fields


def _position(position: LogprobsAtPosition) -> list[dict[str, Any]]:
    """The token itself first, then the most likely ones by rank."""
    return [
        {
            "token_id": token_id,
            "token": one.decoded_token,
            "logprob": _finite(one.logprob),
            "rank": one.rank,
        }
        for token_id, one in position.items()
    ]


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LOWEST_LOGPROB
