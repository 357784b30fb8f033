"""Logprobs of one position in the shape users know: token id -> Logprob."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..outputs import Logprob, LogprobsAtPosition

if TYPE_CHECKING:
    from ..core_io import PositionLogprobs
    from .tokenizer import Tokenizer

__all__ = ["LogprobsAtPosition", "logprobs_at"]


def logprobs_at(position: PositionLogprobs, tokenizer: Tokenizer) -> LogprobsAtPosition:
    """The token itself first, then the most likely ones by rank."""
    ids, values = position.top_ids.tolist(), position.top.tolist()
    ranked = sorted(range(len(ids)), key=lambda i: -values[i])
    result = {
        position.token_id: Logprob(
            position.logprob, position.rank, tokenizer.token_text(position.token_id)
        )
    }
    for rank, i in enumerate(ranked, 1):
        if ids[i] != position.token_id:
            result[ids[i]] = Logprob(values[i], rank, tokenizer.token_text(ids[i]))
    return result
