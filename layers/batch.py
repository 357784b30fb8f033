"""One step's batch as one i32 array: its layout, and its unpacking inside the program.

The host writes a fresh array per step (engine/batch_builder.py), so a step costs one copy to the
device. Positions are not in it: they are device state (one length per row), which the program
advances by the counts sent here.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..pallas_kernels.checks import AttentionBatch

# A token id that stands for "the row's last sampled token, which only the device knows yet".
TOKEN_ON_DEVICE = 2**31 - 1
# Of a row's stop tokens, those that a program of several steps looks for; the host looks for all.
NUM_STOPS = 8


@dataclass(frozen=True)
class StepLayout:
    """The static sizes of one forward program and where each part of its packed input lies.

    tokens and rows are padded counts; width is the page-table width; slots the number of device
    rows; queries_per_item the most queries of a work item; is_decode: each row has one token, and
    attention no work items; num_steps: of a decode program that goes on by itself.
    """

    tokens: int
    rows: int
    groups: int
    width: int
    slots: int
    queries_per_item: int
    is_decode: bool = False
    num_steps: int = 1

    @property
    def name(self) -> str:
        """Of its program; unique within an engine."""
        several = f"{self.num_steps} x " if self.num_steps > 1 else ""
        return f"{several}{'decode' if self.is_decode else 'forward'}[{self.tokens}]"

    @property
    def items(self) -> int:
        """Most work items that rows with at least two queries each can need."""
        if self.is_decode:
            return 0
        # Three tokens in items of two are two items; in larger ones no row has more than its half.
        most = self.tokens // 2 if self.queries_per_item > 2 else self.tokens
        return min(most, self.rows + self.tokens // self.queries_per_item)

    @cached_property
    def parts(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """name -> (offset, shape)."""
        shapes: dict[str, tuple[int, ...]] = {
            "counts": (3,),  # tokens, one-query rows, items
            "flags": (NUM_FLAGS,),
            "token_ids": (self.tokens,),
            "token_row": (self.tokens,),
            "token_offset": (self.tokens,),  # inside the row's chunk
            "row_slot": (self.rows,),  # slots if padded
            "row_count": (self.rows,),
            "sample_token": (self.rows,),  # the token whose hidden state is sampled
            "sample_slot": (self.rows,),  # slots if the row is padded or does not sample
            "item_row": (self.items,),
            "item_first": (self.items,),
            "item_count": (self.items,),
        }
        if self.num_steps > 1:
            shapes |= {"row_steps": (self.rows,), "stop_ids": (self.rows, NUM_STOPS)}
        shapes["page_table"] = (self.groups, self.rows, self.width)
        parts, offset = {}, 0
        for name, shape in shapes.items():
            parts[name] = (offset, shape)
            offset += prod(shape)
        return parts

    @cached_property
    def size(self) -> int:
        offset, shape = self.parts["page_table"]
        return offset + prod(shape)

    def part(self, packed: jax.Array, name: str) -> jax.Array:
        """The named part of i32[size], in its shape."""
        offset, shape = self.parts[name]
        return packed[offset : offset + prod(shape)].reshape(shape)


class CacheShape(NamedTuple):
    """What a step must know of the KV cache. windows: per group."""

    windows: tuple[int | None, ...]
    num_pages: int
    page_size: int


# What some row of the batch needs: parts of `sample`, each of which is skipped when none does.
FLAG_MASKS, FLAG_PENALTIES, FLAG_FILTERS = 0, 1, 2
FLAG_SCORES = 3  # logprobs are taken of tokens of the prompt, so all hidden states are wanted
NUM_FLAGS = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepBatch:
    """The unpacked step."""

    token_ids: jax.Array  # i32[tokens], 0 where padded
    positions: jax.Array  # i32[tokens], absolute
    lengths: jax.Array  # i32[slots], after this step
    attention: tuple[AttentionBatch, ...]  # one per group
    sample_token: jax.Array  # i32[rows]
    sample_slot: jax.Array  # i32[rows], slots if nothing is sampled
    flags: jax.Array  # i32[NUM_FLAGS]


def unpack(
    packed: jax.Array,  # i32[layout.size]
    lengths: jax.Array,  # i32[slots]
    last_token: jax.Array,  # i32[slots]
    layout: StepLayout,
    cache: CacheShape,
    is_running: jax.Array | None = None,  # bool[rows]; the others are padding. None: all run
) -> StepBatch:
    """Everything the layers need, from the packed array and the rows' device state."""
    windows, num_pages, page_size = cache
    part = partial(layout.part, packed)
    num_tokens, num_single, num_items = part("counts")
    is_real = jnp.arange(layout.tokens, dtype=jnp.int32) < num_tokens
    row, row_slot = part("token_row"), part("row_slot")
    sample_slot = part("sample_slot")
    if is_running is not None:
        is_real &= is_running[row]
        row_slot, sample_slot = (
            jnp.where(is_running, s, layout.slots) for s in (row_slot, sample_slot)
        )
    slot = row_slot[row]
    start = lengths.at[slot].get(mode="fill", fill_value=0)
    positions = jnp.where(is_real, start + part("token_offset"), 0)
    ids = part("token_ids")
    on_device = last_token.at[slot].get(mode="fill", fill_value=0)
    ids = jnp.where(ids == TOKEN_ON_DEVICE, on_device, ids)
    end = jnp.where(is_real, positions + 1, 0)

    tables = part("page_table")
    attention = []
    for group, window in enumerate(windows):
        page = tables[group][row, positions // page_size]
        attention.append(
            AttentionBatch(
                attend_from=jnp.zeros_like(end) if window is None else jnp.maximum(end - window, 0),
                attend_to=end,
                token_row=row,
                write_page=jnp.where(is_real, page, num_pages),
                write_offset=positions % page_size,
                page_table=tables[group],
                num_tokens=num_tokens,
                num_single=num_single,
                num_items=num_items,
                item_row=part("item_row"),
                item_first=part("item_first"),
                item_count=part("item_count"),
            )
        )
    return StepBatch(
        token_ids=ids,
        positions=positions,
        lengths=lengths.at[row_slot].add(part("row_count"), mode="drop"),
        attention=tuple(attention),
        sample_token=part("sample_token"),
        sample_slot=sample_slot,
        flags=part("flags"),
    )
