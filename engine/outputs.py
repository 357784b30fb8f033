"""What LLM returns, in vLLM's names and shapes."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Logprob:
    """rank 1 is the most likely token; decoded_token is its text on its own."""

    logprob: float
    rank: int
    decoded_token: str


LogprobsAtPosition = dict[int, Logprob]


@dataclass
class CompletionOutput:
    """One answer. index: which of the n choices; stop_reason: the stop string or stop token id that
    matched, None for the end-of-sequence token.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[LogprobsAtPosition] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """One prompt and its answers. prompt_logprobs: None at the first position; num_cached_tokens:
    prompt tokens served by the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[LogprobsAtPosition | None] | None
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    finished: bool = True


@dataclass(frozen=True)
class StreamDelta:
    """What came since the last delta of this choice. finish_reason is set on its last one."""

    text: str
    token_ids: list[int]
    index: int = 0
    logprobs: list[LogprobsAtPosition] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
