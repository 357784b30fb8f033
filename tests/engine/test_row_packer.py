"""A request's parameters on their way to the device: pack_row, pack_tables, update_rows."""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from quire.engine.request import Request
from quire.engine.row_packer import ban_completions, pack_row, pack_tables, row_needs
from quire.engine.sampling_params import SamplingParams
from quire.layers import rows, sampling
from quire.layers.vocab import Vocabulary

VOCAB, SLOTS = 40, 2
update_rows = jax.jit(rows.update_rows)
run_sample = jax.jit(partial(sampling.sample, vocab=Vocabulary(VOCAB)))


def make_request(output: tuple[int, ...] = (), *, seed: int = 0, **params: Any) -> Request:
    request = Request("r", [1, 2, 3], SamplingParams(max_tokens=9, **params), 0, seed=seed)
    for token in output:
        request.append_token(token)
    request.slot = 1
    return request


def on_device(request: Request, stop_ids: frozenset[int] = frozenset()) -> rows.RowState:
    """The row state after writing the request's row over garbage."""
    state = jax.tree.map(
        lambda leaf: np.full(leaf.shape, -1).astype(leaf.dtype), rows.abstract_rows(SLOTS, VOCAB)
    )
    tables = pack_tables(request, (), stop_ids, VOCAB)
    packed = pack_row(request, 3, VOCAB)[None]
    return update_rows(state, np.zeros(SLOTS, np.int32), packed, tables)[0]


def sample(request: Request, logits: np.ndarray) -> tuple[int, int]:
    """The token and the flag of the request's row."""
    mask = np.full((1, rows.num_words(VOCAB)), 0xFFFFFFFF, np.uint32)
    sampled, _ = run_sample(
        logits[None], on_device(request), np.array([1]), np.ones(4, np.int32), mask
    )
    token, flag = np.asarray(sampled.token_and_flag)[:, 0]
    return int(token), int(flag)


def test_a_row_says_what_the_request_says():
    request = make_request(
        (5, 5), temperature=0.5, top_k=4, top_p=0.75, min_p=0.25, presence_penalty=1.5,
        frequency_penalty=-0.5, repetition_penalty=2.0, logit_bias={7: -2.5, 3: 1.0}, min_tokens=4,
    )  # fmt: skip
    state = jax.tree.map(lambda leaf: np.asarray(leaf)[1], on_device(request, frozenset([9])))
    for name, value in {
        "last_token": 5, "num_output": 2, "temperature": 0.5, "top_k": 4, "top_p": 0.75,
        "min_p": 0.25, "presence": 1.5, "frequency": -0.5, "repetition": 2.0, "min_tokens": 4,
    }.items():  # fmt: skip
        assert getattr(state, name) == value
    assert state.bias_id[:3].tolist() == [7, 3, VOCAB]
    assert state.bias_value[:3].tolist() == [-2.5, 1.0, 0.0]
    assert np.flatnonzero(state.counts).tolist() == [5]
    assert state.counts[5] == 2
    np.testing.assert_array_equal(state.prompt_seen, rows.pack_bits([1, 2, 3], VOCAB))
    np.testing.assert_array_equal(state.banned_early, rows.pack_bits([9], VOCAB))


@pytest.mark.parametrize(("top_k", "packed"), [(0, VOCAB), (-1, VOCAB), (VOCAB + 1, VOCAB), (1, 1)])
def test_top_k_that_is_off_is_the_vocabulary(top_k: int, packed: int):
    assert on_device(make_request(top_k=top_k)).top_k[1] == packed


def test_the_ends_of_float32_neither_divide_by_zero_nor_overflow():
    """A temperature of 1e-38 is no normal f32 and became 0 on the device: 0 / 0."""
    logits = np.linspace(-3, 3, VOCAB, dtype=np.float32)
    logits[[4, 8]] = 5.0
    for params in (
        {"temperature": 1e-38},
        {"temperature": 1e-300},
        {"temperature": 0.5, "repetition_penalty": 1e-30},
        {"temperature": 0.5, "repetition_penalty": 1e300},
        {"temperature": 0.5, "repetition_penalty": 1e-300, "min_p": 1.0},
    ):
        for seed in (1, 2**63 + 5, -7):
            token, flag = sample(make_request(seed=seed, **params), logits)
            assert flag == 0
            if params["temperature"] < 0.1:
                assert token in (4, 8)  # the draw is among the ties of the highest
    tokens = {sample(make_request(seed=s, temperature=1e-38), logits)[0] for s in range(12)}
    assert tokens == {4, 8}


def test_counts_stop_at_the_end_of_their_type():
    """A token sampled 32768 times made its count negative, and its penalty a reward."""
    request = make_request(temperature=0.0, frequency_penalty=1e-3)
    state = on_device(request)
    state = dataclasses.replace(state, counts=np.full((SLOTS, VOCAB), 2**15 - 1, np.int16))
    mask = np.full((1, rows.num_words(VOCAB)), 0xFFFFFFFF, np.uint32)
    logits = np.linspace(0, 1, VOCAB, dtype=np.float32)[None]
    _, after = run_sample(logits, state, np.array([1]), np.ones(4, np.int32), mask)
    assert np.asarray(after.counts).min() == 2**15 - 1
    request = make_request((3,) * 40_000)
    assert pack_tables(request, (), frozenset(), VOCAB).counts[3] == 2**15 - 1


@pytest.mark.parametrize(
    ("params", "needs"),
    [
        ({"temperature": 0.0}, {"is_plain_greedy"}),
        ({"temperature": 0.0, "top_k": 5}, {"is_plain_greedy"}),
        ({}, set()),
        ({"top_k": 5}, {"filters"}),
        ({"top_k": VOCAB}, set()),
        ({"top_p": 0.9}, {"filters"}),
        ({"min_p": 0.1}, {"filters"}),
        ({"temperature": 0.0, "logit_bias": {1: 1.0}}, {"masks"}),
        ({"allowed_token_ids": [1]}, {"masks", "tables"}),
        ({"min_tokens": 2}, {"masks", "tables"}),
        ({"presence_penalty": 0.1}, {"penalties", "tables"}),
        ({"temperature": 0.0, "repetition_penalty": 1.1}, {"penalties", "tables"}),
        ({"logprobs": 0}, {"logprobs"}),
    ],
)
def test_a_row_needs_no_more_than_its_parameters(params: dict[str, Any], needs: set[str]):
    made = row_needs(make_request(**params), (), VOCAB)
    assert {name for name, value in vars(made).items() if value} == needs


def test_bad_words_of_one_token_are_a_mask_and_longer_ones_wait_for_their_beginning():
    words = ((7,), (1, 2, 8), (2, 33))
    request = make_request(allowed_token_ids=[7, 8, 9])
    needs = row_needs(request, words, VOCAB)
    assert needs.step_mask
    assert needs.masks
    allowed = pack_tables(request, words, frozenset(), VOCAB).allowed
    np.testing.assert_array_equal(allowed, rows.pack_bits([8, 9], VOCAB))
    for known, banned in (([5, 1, 2], [8, 33]), ([2], [33]), ([2, 1], []), ([], [])):
        mask = np.full(rows.num_words(VOCAB), 0xFFFFFFFF, np.uint32)
        ban_completions(mask, known, words)
        bits = np.asarray(rows.unpack_bits(mask[None], VOCAB))[0]
        assert np.flatnonzero(~bits).tolist() == banned
