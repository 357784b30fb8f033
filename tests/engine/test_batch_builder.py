"""The packed array of a step against a plain re-computation from the plan."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quire.engine.batch_builder import BatchBuilder, PackedStep
from quire.engine.buckets import plan_buckets
from quire.engine.request import Request
from quire.engine.row_packer import RowNeeds
from quire.engine.sampling_params import SamplingParams
from quire.engine.scheduler import Scheduler, SchedulerConfig
from quire.engine.step_plan import Chunk, StepPlan
from quire.layers.batch import (
    FLAG_FILTERS,
    FLAG_MASKS,
    FLAG_PENALTIES,
    FLAG_SCORES,
    TOKEN_ON_DEVICE,
    CacheShape,
    unpack,
)

PAGE_SIZE, WIDTH, SLOTS, NUM_PAGES = 4, 20, 5, 60
BUCKETS = plan_buckets(
    "cpu",
    max_num_seqs=SLOTS,
    max_num_batched_tokens=48,
    token_buckets=None,
    pages_per_row=WIDTH,
    num_groups=2,
    is_padding_free=False,
)
NOTHING = RowNeeds(*[False] * 7)


def make_request(name: str, prompt: list[int]) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=30), 0)


def make_plan(*chunks: Chunk, admitted: tuple[Request, ...] = ()) -> StepPlan:
    return StepPlan(chunks, admitted, (), sum(chunk.count for chunk in chunks))


def running(name: str, slot: int, prompt: list[int], pages: list[list[int]]) -> Request:
    request = make_request(name, prompt)
    request.slot, request.pages = slot, pages
    return request


def parts(step: PackedStep) -> dict[str, np.ndarray]:
    return {
        name: step.packed[offset : offset + int(np.prod(shape))].reshape(shape)
        for name, (offset, shape) in step.layout.parts.items()
    }


def assert_is_the_plan(step: PackedStep, plan: StepPlan) -> None:
    """Every part, written out from the plan alone; page tables up to the pages a query can see."""
    layout, part = step.layout, parts(step)
    assert layout == BUCKETS.layout(BUCKETS.tokens_for(plan.num_tokens))
    tokens: list[tuple[int, int, int]] = []  # id, row, offset
    items: list[tuple[int, int, int]] = []
    sample_token, sample_slot = np.zeros(layout.rows), np.full(layout.rows, SLOTS)
    row_slot, row_count = np.full(layout.rows, SLOTS), np.zeros(layout.rows)
    for row, chunk in enumerate(plan.chunks):
        assert step.first_token[row] == len(tokens)
        known = chunk.request.prompt_token_ids + chunk.request.output_token_ids
        for at in range(chunk.count):
            most = layout.queries_per_item
            if chunk.count > 1 and at % most == 0:
                items.append((row, len(tokens), min(most, chunk.count - at)))
            position = chunk.first + at
            is_known = position < len(known)
            tokens.append((known[position] if is_known else TOKEN_ON_DEVICE, row, at))
        row_slot[row], row_count[row] = chunk.slot, chunk.count
        sample_token[row] = len(tokens) - 1
        sample_slot[row] = chunk.slot if chunk.samples else SLOTS
        for group, pages in enumerate(chunk.request.pages):
            table = part["page_table"][group, row]
            # A page that fell out of a window may stay in the table; nothing is past the end.
            for at, page in enumerate(pages):
                assert page in (table[at], 0)
            assert not table[len(pages) :].any()
    padding = [(0, 0, 0)] * (layout.tokens - len(tokens))
    no_items = [(0, 0, 0)] * (layout.items - len(items))
    for names, rows in (
        (("token_ids", "token_row", "token_offset"), tokens + padding),
        (("item_row", "item_first", "item_count"), items + no_items),
    ):
        for name, column in zip(names, np.array(rows).reshape(-1, 3).T, strict=True):
            np.testing.assert_array_equal(part[name], column, name)
    for name, want in (
        ("row_slot", row_slot), ("row_count", row_count),
        ("sample_token", sample_token), ("sample_slot", sample_slot),
    ):  # fmt: skip
        np.testing.assert_array_equal(part[name], want, name)
    num_single = sum(chunk.count == 1 for chunk in plan.chunks)
    assert part["counts"].tolist() == [len(tokens), num_single, len(items)]
    assert not part["page_table"][:, len(plan.chunks) :].any()


def test_a_mixed_step_is_packed_as_planned():
    one = running("one", 3, [1, 2, 3, 4, 5], [[7, 8], [9, 10]])
    one.append_token(6)
    ahead = running("ahead", 0, [11, 12], [[11], [12]])  # its last token is on the device only
    ahead.num_in_flight = 1
    long = running("long", 4, list(range(100, 140)), [list(range(20, 30)), [0, 0, *range(30, 38)]])
    plan = make_plan(
        Chunk(one, 3, 5, 1, True),
        Chunk(ahead, 0, 2, 1, True),
        Chunk(long, 4, 3, 35, False),
        admitted=(one, ahead, long),
    )
    step = BatchBuilder(BUCKETS).build(plan, [NOTHING] * 3)
    assert_is_the_plan(step, plan)
    part = parts(step)
    assert part["token_ids"][:3].tolist() == [6, TOKEN_ON_DEVICE, 103]
    assert part["item_count"].tolist()[:3] == [16, 16, 3]
    assert part["page_table"][1, 2, :3].tolist() == [0, 0, 30]


def test_flags_are_what_any_row_needs():
    request = running("a", 0, [1], [[1], [2]])
    plan = make_plan(Chunk(request, 0, 0, 1, True), admitted=(request,))
    for name, flag in (
        ("masks", FLAG_MASKS), ("penalties", FLAG_PENALTIES), ("filters", FLAG_FILTERS),
    ):  # fmt: skip
        needs = [NOTHING, RowNeeds(**(vars(NOTHING) | {name: True}))]
        flags = parts(BatchBuilder(BUCKETS).build(plan, needs))["flags"]
        assert np.flatnonzero(flags).tolist() == [flag]


@pytest.mark.parametrize(
    ("first", "count", "is_wanted"), [(0, 3, True), (0, 4, True), (2, 1, True), (3, 1, False)]
)
def test_all_hidden_states_are_wanted_where_the_prompt_is_scored(
    first: int, count: int, is_wanted: bool
):
    """Its last token has no next one in the prompt, and a decode step none at all."""
    flags = []
    for wanted in (None, 1):
        request = running("a", 0, [1, 2, 3, 4], [[1], [2]])
        request.params = dataclasses.replace(request.params, prompt_logprobs=wanted)
        plan = make_plan(Chunk(request, 0, first, count, True), admitted=(request,))
        flags.append(parts(BatchBuilder(BUCKETS).build(plan, [NOTHING]))["flags"][FLAG_SCORES])
    assert flags == [False, is_wanted]


def test_a_slot_that_is_reused_shows_no_page_of_its_last_owner():
    builder = BatchBuilder(BUCKETS)
    first = running("first", 2, list(range(9)), [[1, 2, 3], [4, 5, 6]])
    builder.build(make_plan(Chunk(first, 2, 0, 9, True), admitted=(first,)), [NOTHING])
    second = running("second", 2, [1, 2], [[8], [9]])
    plan = make_plan(Chunk(second, 2, 0, 2, True), admitted=(second,))
    step = builder.build(plan, [NOTHING])
    assert_is_the_plan(step, plan)
    assert parts(step)["page_table"][:, 0, :3].tolist() == [[8, 0, 0], [9, 0, 0]]


def test_every_step_is_a_fresh_array():
    """On CPU a running step still reads the last one: it must not change."""
    builder = BatchBuilder(BUCKETS)
    request = running("a", 1, [5, 6], [[1], [2]])
    first = builder.build(make_plan(Chunk(request, 1, 0, 2, True), admitted=(request,)), [NOTHING])
    before = first.packed.copy()
    request.append_token(7)
    request.pages = [[1, 3], [2, 4]]
    second = builder.build(make_plan(Chunk(request, 1, 2, 1, True)), [NOTHING])
    assert not np.shares_memory(first.packed, second.packed)
    assert not np.shares_memory(second.packed, builder._tables)
    np.testing.assert_array_equal(first.packed, before)
    assert parts(second)["page_table"][:, 0, :2].tolist() == [[1, 3], [2, 4]]


class Lengths:
    """The device's share: lengths per slot, advanced by unpack as the programs do."""

    def __init__(self) -> None:
        self.lengths = np.full(SLOTS, 99, np.int32)  # of former owners, until reset

    def run(self, step: PackedStep, plan: StepPlan) -> Any:
        for request in plan.admitted:
            chunk = next(c for c in plan.chunks if c.request is request)
            self.lengths[request.slot] = chunk.first
        last_token = np.arange(SLOTS, dtype=np.int32) + 1000
        batch = unpack(
            step.packed, _jax(self.lengths), _jax(last_token), step.layout,
            CacheShape((None, 6), NUM_PAGES, PAGE_SIZE),
        )  # fmt: skip
        self.lengths = np.array(batch.lengths)
        return batch


def _jax(array: np.ndarray) -> Any:
    import jax.numpy as jnp

    return jnp.array(array)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 2**16))
@settings(max_examples=8, deadline=None)
def test_steps_of_a_real_scheduler_give_the_device_what_it_planned(prompts: list[int], seed: int):
    """Slots are reused, pages fall out of windows; positions come from the device's lengths."""
    rng = np.random.default_rng(seed)
    scheduler = Scheduler(
        SchedulerConfig(
            page_size=PAGE_SIZE, num_pages=NUM_PAGES, num_slots=3, max_num_batched_tokens=48,
            max_model_len=64, windows=(None, 6), enable_prefix_caching=True, secret=b"s",
        )
    )  # fmt: skip
    requests = [
        make_request(f"r{i}", rng.integers(0, 9, n).tolist()) for i, n in enumerate(prompts)
    ]
    for request in requests:
        scheduler.add(request)
    builder, device = BatchBuilder(BUCKETS), Lengths()
    for _ in range(40):
        plan = scheduler.schedule(0.0)
        if not plan.chunks:
            break
        step = builder.build(plan, [NOTHING] * len(plan.chunks))
        assert_is_the_plan(step, plan)
        batch = device.run(step, plan)
        assert_device_sees(batch, plan)
        for chunk in plan.chunks:
            if chunk.samples:
                scheduler.on_token(chunk.request, int(rng.integers(0, 9)))
                if chunk.request.num_output > 4:
                    scheduler.finish(chunk.request, "stop")


def assert_device_sees(batch: Any, plan: StepPlan) -> None:
    token = 0
    for chunk in plan.chunks:
        for position in range(chunk.first, chunk.first + chunk.count):
            assert batch.positions[token] == position
            for group, attention in enumerate(batch.attention):
                page = chunk.request.pages[group][position // PAGE_SIZE]
                assert attention.write_page[token] == page
                assert attention.write_offset[token] == position % PAGE_SIZE
                start = 0 if group == 0 else max(0, position - 5)
                assert (attention.attend_from[token], attention.attend_to[token]) == (
                    start,
                    position + 1,
                )
            token += 1
    for attention in batch.attention:
        assert (np.asarray(attention.write_page)[token:] == NUM_PAGES).all()
        assert not np.asarray(attention.attend_to)[token:].any()
