from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quire.engine.buckets import Buckets, plan_buckets
from quire.engine.errors import ConfigError
from quire.layers.programs import Variant


def plan(platform: str = "cpu", **changes: Any) -> Buckets:
    defaults = {"max_num_seqs": 64, "max_num_batched_tokens": 1024, "token_buckets": None,
                "pages_per_row": 128, "num_groups": 1, "is_padding_free": False}  # fmt: skip
    return plan_buckets(platform, **(defaults | changes))


def test_the_programs_of_the_cpu_defaults():
    buckets = plan()
    assert buckets.tokens == (2, 8, 16, 32, 64, 256, 1024)
    assert buckets.rows == (8, 32, 64)
    assert {t: buckets.layout(t).rows for t in buckets.tokens} == {
        2: 8, 8: 8, 16: 32, 32: 32, 64: 64, 256: 64, 1024: 64,
    }  # fmt: skip
    greedy, general = Variant.GREEDY, Variant.GENERAL
    assert buckets.sample_programs() == [
        (8, greedy), (8, general), (32, greedy), (32, general), (64, greedy), (64, general),
    ]  # fmt: skip
    assert buckets.score_programs() == [(8, 8), (32, 32), (64, 64), (256, 64), (1024, 64)]


def test_kernels_without_padding_need_fewer_programs():
    buckets = plan(is_padding_free=True)
    assert buckets.tokens == (1, 8, 32, 128, 512, 1024)
    assert [buckets.fill(wanted) for wanted in (1, 33, 700, 1024, 5000)] == [1, 33, 700, 1024, 1024]
    assert plan(is_padding_free=True, token_buckets=(1, 1024)).tokens == (1, 1024)


def test_the_programs_of_the_gpu_defaults():
    buckets = plan("cuda", max_num_seqs=256, max_num_batched_tokens=8192)
    assert buckets.tokens == (8, 16, 32, 64, 256, 1024, 2048, 4096, 8192)
    assert buckets.rows == (8, 32, 64, 128, 256)
    assert buckets.decode_tokens == (8, 16, 32, 64, 256)
    assert len(buckets.forward_layouts()) == 14


def test_a_step_of_one_token_a_row_has_its_own_program_on_a_gpu():
    buckets = plan("cuda", max_num_seqs=64, max_num_batched_tokens=1024)
    mixed = buckets.layout_for(9, is_decode=False, num_steps=1)
    decode = buckets.layout_for(9, is_decode=True, num_steps=1)
    assert (mixed.name, decode.name) == ("forward[16]", "decode[16]")
    assert mixed.items > decode.items == 0
    assert buckets.layout_for(65, is_decode=True, num_steps=1).name == "forward[256]"
    on_cpu = plan().layout_for(9, is_decode=True, num_steps=1)
    assert on_cpu.name == "forward[16]"


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_programs_of_several_steps_are_there_for_every_number_of_rows(platform: str):
    assert plan(platform).loop_programs() == []
    buckets = plan(platform, decode_steps=4, max_num_seqs=40)
    names = {layout.name for layout, _ in buckets.loop_programs()}
    for rows in range(1, 41):
        layout = buckets.layout_for(rows, is_decode=True, num_steps=3)
        assert layout.name in names
        assert (layout.num_steps, layout.items) == (4, 0)
        assert layout.tokens >= rows
        assert layout.rows >= rows


@given(
    st.sampled_from(["cpu", "cuda"]), st.integers(1, 600), st.integers(2, 20_000), st.integers(1, 3)
)
def test_every_step_has_a_program_that_holds_it(platform: str, seqs: int, most: int, groups: int):
    buckets = plan(platform, max_num_seqs=seqs, max_num_batched_tokens=most, num_groups=groups)
    assert len(buckets.tokens) <= (12 if platform == "cpu" else 20)
    assert buckets.tokens == tuple(sorted(set(buckets.tokens)))
    least = 2 if platform == "cpu" else 8
    assert buckets.tokens[-1] == max(most, least)
    assert min(*buckets.tokens, *buckets.rows) >= least
    for num_tokens in {1, 2, most // 2 + 1, most - 1, most, *buckets.tokens}:
        tokens = buckets.tokens_for(num_tokens)
        layout = buckets.layout(tokens)
        assert layout.tokens == tokens >= num_tokens
        assert layout.rows >= min(num_tokens, seqs)
        assert layout.rows in buckets.rows
        assert (layout.groups, layout.width, layout.slots) == (groups, 128, seqs)
        # What logprobs of sampled rows and of whole steps need is there too.
        scores = buckets.score_programs()
        assert (layout.rows, layout.rows) in scores
        assert (max(tokens, 64), 64) in scores


@pytest.mark.parametrize("most", [1, 2, 3, 16, 36])
@given(st.lists(st.integers(2, 70), min_size=1, max_size=9), st.integers(0, 8))
def test_a_layout_has_room_for_the_work_items_of_any_rows(
    most: int, counts: list[int], num_single: int
):
    buckets = plan(max_num_seqs=32, queries_per_item=most)
    layout = buckets.layout(buckets.tokens_for(sum(counts) + num_single))
    items = sum(-(-count // most) for count in counts)
    assert items <= layout.items


def test_given_token_buckets_are_taken_in_order_and_once():
    assert plan(token_buckets=(1024, 16, 16, 2)).tokens == (2, 16, 1024)
    assert plan("cuda", token_buckets=(1024, 1)).tokens == (1, 1024)


@pytest.mark.parametrize(
    ("platform", "token_buckets", "message"),
    [
        ("cpu", (1, 1024), "token_buckets must be at least 2 on cpu, got [1, 1024]"),
        ("cuda", (0, 1024), "token_buckets must be at least 1 on cuda, got [0, 1024]"),
        ("cpu", (), "token_buckets must be at least 2 on cpu, got []"),
        (
            "cpu",
            (2, 512),
            "the largest of token_buckets must be max_num_batched_tokens = 1024, got 512",
        ),
    ],
)
def test_token_buckets_that_cannot_serve_a_step(
    platform: str, token_buckets: tuple[int, ...], message: str
):
    with pytest.raises(ConfigError) as caught:
        plan(platform, token_buckets=token_buckets)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("wanted", "now"),
    [
        (1, 1), (9, 9), (64, 64), (70, 70), (100, 100), (256, 256),
        (300, 256), (512, 256), (640, 640), (1000, 1000), (1024, 1024), (5000, 1024),
    ],
)  # fmt: skip
def test_a_step_that_would_be_mostly_padding_is_made_smaller(wanted: int, now: int):
    assert plan("cpu", max_num_seqs=64, max_num_batched_tokens=1024).fill(wanted) == now
