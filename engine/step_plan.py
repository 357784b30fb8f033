"""What one step computes: records that the scheduler makes and others read."""

from dataclasses import dataclass

from .request import Request


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens first .. first+count-1 of one request, computed in one step."""

    request: Request
    slot: int
    first: int
    count: int
    samples: bool  # the chunk reaches the last known token, so the next one is sampled
    num_steps: int = 1  # of one token each; a count of 1 that goes on with what it samples

    @property
    def scored(self) -> range:
        """Positions that prompt logprobs are taken at: position i scores prompt token i + 1."""
        request = self.request
        if request.params.prompt_logprobs is None:
            return range(0)
        return range(self.first, min(self.first + self.count, request.num_prompt - 1))


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Without chunks there is nothing to run: read what is in flight, or wait."""

    chunks: tuple[Chunk, ...]  # those of one token first
    admitted: tuple[Request, ...]  # their device rows must be written before the step
    preempted: tuple[Request, ...]
    num_tokens: int  # of its first step

    @property
    def num_steps(self) -> int:
        return max((chunk.num_steps for chunk in self.chunks), default=0)

    @property
    def total_tokens(self) -> int:
        """Of all its steps."""
        return sum(chunk.count + chunk.num_steps - 1 for chunk in self.chunks)
