"""Packs a plan into the one i32 array of its step.

Page tables are kept per slot and only their new pages are written, so a decode step copies them in
one go.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from ..layers.batch import (
    FLAG_FILTERS,
    FLAG_MASKS,
    FLAG_PENALTIES,
    FLAG_SCORES,
    TOKEN_ON_DEVICE,
    StepLayout,
)
from .buckets import Buckets
from .row_packer import RowNeeds
from .step_plan import Chunk, StepPlan


@dataclass(frozen=True)
class PackedStep:
    """A step ready to run. first_token: index in the batch of each chunk's first token."""

    packed: np.ndarray  # i32[layout.size]
    layout: StepLayout
    first_token: tuple[int, ...]


class BatchBuilder:
    """Holds the page tables of all slots between steps."""

    def __init__(self, buckets: Buckets) -> None:
        self._buckets = buckets
        shape = (buckets.groups, buckets.slots, buckets.width)
        self._tables = np.zeros(shape, np.int32)
        self._written = [[0] * buckets.slots for _ in range(buckets.groups)]

    def build(self, plan: StepPlan, needs: list[RowNeeds]) -> PackedStep:
        """needs: of each chunk's request, in the order of plan.chunks."""
        for request in plan.admitted:
            assert request.slot is not None
            self._tables[:, request.slot] = 0
            for written in self._written:
                written[request.slot] = 0
        num_single = sum(chunk.count == 1 for chunk in plan.chunks)
        num_rows = len(plan.chunks)
        layout = self._buckets.layout_for(
            plan.num_tokens, is_decode=num_single == num_rows, num_steps=plan.num_steps
        )
        packed = np.zeros(layout.size, np.int32)
        part = {
            name: packed[offset : offset + prod(shape)].reshape(shape)
            for name, (offset, shape) in layout.parts.items()
        }
        slots = [chunk.slot for chunk in plan.chunks]
        first_token = self._fill_tokens(plan.chunks, part)
        for chunk in plan.chunks:
            self._refresh_table(chunk)
        part["page_table"][:, :num_rows] = self._tables[:, slots]
        items = [
            (row, first_token[row] + at, min(layout.queries_per_item, chunk.count - at))
            for row, chunk in enumerate(plan.chunks[num_single:], num_single)
            for at in range(0, chunk.count, layout.queries_per_item)
        ]
        if items:
            for name, column in zip(
                ("item_row", "item_first", "item_count"), np.array(items).T, strict=True
            ):
                part[name][: len(items)] = column
        part["counts"][:] = plan.num_tokens, num_single, len(items)
        for flag, is_needed in (
            (FLAG_MASKS, any(n.masks for n in needs)),
            (FLAG_PENALTIES, any(n.penalties for n in needs)),
            (FLAG_FILTERS, any(n.filters for n in needs)),
            (FLAG_SCORES, any(chunk.scored for chunk in plan.chunks)),
        ):
            part["flags"][flag] = is_needed
        part["row_slot"][:] = part["sample_slot"][:] = layout.slots
        part["row_slot"][:num_rows] = slots
        part["row_count"][:num_rows] = [chunk.count for chunk in plan.chunks]
        part["sample_slot"][:num_rows] = [
            c.slot if c.samples else layout.slots for c in plan.chunks
        ]
        part["sample_token"][:num_rows] = [
            first + chunk.count - 1 for first, chunk in zip(first_token, plan.chunks, strict=True)
        ]
        if layout.num_steps > 1:
            part["row_steps"][:num_rows] = [chunk.num_steps for chunk in plan.chunks]
            part["stop_ids"][:] = TOKEN_ON_DEVICE  # no token's id
            for row, need in enumerate(needs):
                part["stop_ids"][row, : len(need.stop_ids)] = need.stop_ids
        return PackedStep(packed, layout, tuple(first_token))

    def _fill_tokens(self, chunks: tuple[Chunk, ...], part: dict[str, np.ndarray]) -> list[int]:
        ids: list[int] = []
        row_of: list[int] = []
        offset: list[int] = []
        first_token = []
        for row, chunk in enumerate(chunks):
            first_token.append(len(ids))
            known = chunk.request.token_ids(chunk.first, chunk.count)
            # What the host does not know yet is the row's last sampled token.
            known += [TOKEN_ON_DEVICE] * (chunk.count - len(known))
            ids += known
            row_of += [row] * chunk.count
            offset += range(chunk.count)
        for name, values in (("token_ids", ids), ("token_row", row_of), ("token_offset", offset)):
            part[name][: len(values)] = values
        return first_token

    def _refresh_table(self, chunk: Chunk) -> None:
        """Copy the pages that the slot's table does not have yet. Pages that fell out of a window
        stay: no query sees them.
        """
        for group, pages in enumerate(chunk.request.pages):
            start = self._written[group][chunk.slot]
            if start < len(pages):
                self._tables[group, chunk.slot, start : len(pages)] = pages[start:]
                self._written[group][chunk.slot] = len(pages)
