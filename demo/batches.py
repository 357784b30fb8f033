"""Batches of packed rows: a pure function of the seed and the step, so training can resume."""

from dataclasses import dataclass
from random import Random

import numpy as np
import tokenizers

from .corpus import draw_conversation
from .exchange import Conversation
from .tokenizer import EncodedConversation, encode_conversations


@dataclass(frozen=True)
class Batch:
    """Arrays are [rows, tokens]; padding is token 0 in segment 0 with weight 0."""

    token_ids: np.ndarray  # i32
    targets: np.ndarray  # i32, the token after each
    segment_ids: np.ndarray  # i32, from 1
    target_weights: np.ndarray  # f32, 1 where the target is the assistant's


def make_batch(
    tokenizer: tokenizers.Tokenizer, seed: int, step: int, num_rows: int, row_tokens: int
) -> Batch:
    """Conversations that do not fit a row are left out; the rest are packed longest first."""
    rng = step_rng(seed, step)
    room = num_rows * row_tokens
    chosen: list[EncodedConversation] = []
    while room > 0:
        for encoded in encode_conversations(tokenizer, draw_conversations(rng)):
            if len(encoded.token_ids) <= row_tokens:
                chosen.append(encoded)
                room -= len(encoded.token_ids)
    return _pack(chosen, num_rows, row_tokens)


def step_rng(seed: int, step: int) -> Random:
    return Random(f"batch {seed} {step}")


def draw_conversations(rng: Random) -> list[Conversation]:
    """A step's first; a batch that they do not fill draws as many again."""
    return [draw_conversation(rng) for _ in range(32)]


def _pack(conversations: list[EncodedConversation], num_rows: int, row_tokens: int) -> Batch:
    batch = Batch(
        *(np.zeros((num_rows, row_tokens), np.int32) for _ in range(3)),
        np.zeros((num_rows, row_tokens), np.float32),
    )
    num_used = [0] * num_rows
    num_segments = [0] * num_rows
    # First fit, longest first: stories would otherwise be what is left out.
    for conversation in sorted(conversations, key=lambda c: -len(c.token_ids)):
        size = len(conversation.token_ids)
        row = next((r for r in range(num_rows) if num_used[r] + size <= row_tokens), None)
        if row is None:
            continue
        start, end = num_used[row], num_used[row] + size
        num_used[row] = end
        num_segments[row] += 1
        batch.token_ids[row, start:end] = conversation.token_ids
        batch.segment_ids[row, start:end] = num_segments[row]
        batch.targets[row, start : end - 1] = conversation.token_ids[1:]
        batch.target_weights[row, start : end - 1] = conversation.is_answer[1:]
    return batch
