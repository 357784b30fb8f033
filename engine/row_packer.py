"""A request's sampling parameters as one device row, and what the row needs from `sample`."""

from dataclasses import dataclass

import numpy as np

from ..layers import rows
from ..layers.batch import NUM_STOPS
from .request import Request

_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class RowNeeds:
    """Which parts of the sample program a request uses; fixed for its life."""

    masks: bool
    penalties: bool
    filters: bool
    logprobs: bool
    step_mask: bool  # masks that depend on the last tokens: bad words of several tokens
    tables: bool  # the row carries wide tables
    is_plain_greedy: bool
    stop_ids: tuple[int, ...] = ()  # those that the device looks for

    @property
    def allows_steps(self) -> bool:
        """Whether several steps may go by before the host sees a token."""
        return not (self.logprobs or self.step_mask)


def row_needs(
    request: Request,
    bad_words: tuple[tuple[int, ...], ...],
    vocab: int,
    stop_ids: frozenset[int] = frozenset(),
) -> RowNeeds:
    p = request.params
    penalties = (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) != (0, 0, 1)
    step_mask = any(len(word) > 1 for word in bad_words)
    has_bits = p.allowed_token_ids is not None or p.min_tokens > 0 or bool(bad_words)
    masks = has_bits or bool(p.logit_bias)
    filters = p.temperature > 0 and (0 < p.top_k < vocab or p.top_p < 1 or p.min_p > 0)
    return RowNeeds(
        masks=masks,
        penalties=penalties,
        filters=filters,
        logprobs=p.logprobs is not None,
        step_mask=step_mask,
        tables=has_bits or penalties,
        is_plain_greedy=p.temperature == 0 and not (masks or penalties),
        stop_ids=tuple(sorted(stop_ids))[:NUM_STOPS],
    )


def pack_row(request: Request, length: int, vocab: int) -> np.ndarray:
    """i32[NUM_COLUMNS] of a request that was just given its slot; length: its computed tokens."""
    p = request.params
    packed = np.zeros(rows.NUM_COLUMNS, np.int32)
    seed = request.seed & 0xFFFFFFFFFFFFFFFF
    last = request.token_ids(request.num_tokens - 1, 1)[0]
    top_k = p.top_k if 0 < p.top_k < vocab else vocab
    whole = (
        request.slot, length, last, request.num_output, seed >> 32, seed & 0xFFFFFFFF,
        request.choice, top_k, p.min_tokens,
    )  # fmt: skip
    # Values that float32 would make 0 or infinite act the same at the ends of its range.
    temperature = max(p.temperature, _TINY) if p.temperature > 0 else 0.0
    repetition = min(max(p.repetition_penalty, 1e-30), 1e30)
    real = (
        temperature, p.top_p, p.min_p, p.presence_penalty, p.frequency_penalty, repetition
    )  # fmt: skip
    packed[: len(whole)] = np.array(whole, np.uint64).astype(np.uint32).view(np.int32)
    packed[len(whole) : len(whole) + len(real)] = np.array(real, np.float32).view(np.int32)
    start = len(rows.ROW_COLUMNS)
    packed[start : start + rows.MAX_BIASES] = vocab  # unused pairs point past the vocabulary
    if p.logit_bias:
        count = len(p.logit_bias)
        packed[start : start + count] = list(p.logit_bias.keys())
        values = np.array(list(p.logit_bias.values()), np.float32)
        packed[start + rows.MAX_BIASES : start + rows.MAX_BIASES + count] = values.view(np.int32)
    return packed


def pack_tables(
    request: Request, bad_words: tuple[tuple[int, ...], ...], stop_ids: frozenset[int], vocab: int
) -> rows.RowTables:
    """The wide tables of a row. stop_ids: tokens that end the request, banned before min_tokens."""
    p = request.params
    if p.allowed_token_ids is None:
        allowed = ~np.zeros(rows.num_words(vocab), np.uint32)
    else:
        allowed = rows.pack_bits(p.allowed_token_ids, vocab)
    banned = [word[0] for word in bad_words if len(word) == 1]
    if banned:
        allowed = allowed & ~rows.pack_bits(banned, vocab)
    early = sorted(stop_ids) if p.min_tokens > 0 else []
    counts = np.bincount(np.array(request.output_token_ids, np.int64), minlength=vocab)
    return rows.RowTables(
        allowed=allowed,
        banned_early=rows.pack_bits(early, vocab),
        prompt_seen=rows.pack_bits(request.prompt_token_ids, vocab),
        counts=np.minimum(counts, 2**15 - 1).astype(np.int16),
    )


def ban_completions(
    mask: np.ndarray, known: list[int], bad_words: tuple[tuple[int, ...], ...]
) -> None:
    """Clear in mask u32[words] each token that completes a bad word after the known tokens."""
    for word in bad_words:
        before = len(word) - 1
        if before and known[-before:] == list(word[:-1]):
            mask[word[-1] // 32] &= ~np.uint32(1 << (word[-1] % 32))
