"""update_rows writes whole rows and nothing else, whatever was in the slot before."""

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quire.layers import rows
from quire.layers.rows import MAX_BIASES, NUM_COLUMNS, ROW_COLUMNS, RowTables

VOCAB, SLOTS = 70, 5
REAL = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")


def garbage(seed: int = 0) -> tuple[rows.RowState, np.ndarray]:
    """Random bytes in every leaf, NaN in the floats."""
    rng = np.random.default_rng(seed)

    def make(leaf: Any) -> np.ndarray:
        made = np.frombuffer(rng.bytes(int(np.prod(leaf.shape)) * leaf.dtype.itemsize), leaf.dtype)
        made = made.reshape(leaf.shape).copy()
        return np.full_like(made, np.nan) if made.dtype.kind == "f" else made

    return jax.tree.map(make, rows.abstract_rows(SLOTS, VOCAB)), rng.integers(
        0, 99, SLOTS, np.int32
    )


def pack(slot: int, **columns: float) -> np.ndarray:
    packed = np.zeros(NUM_COLUMNS, np.int32)
    for name, value in {"slot": slot, **columns}.items():
        bits = np.float32(value).view(np.int32) if name in REAL else np.uint32(value).view(np.int32)
        packed[ROW_COLUMNS.index(name)] = bits
    packed[len(ROW_COLUMNS) : len(ROW_COLUMNS) + MAX_BIASES] = VOCAB
    return packed


update = jax.jit(rows.update_rows)


def test_a_row_is_reset_in_every_leaf():
    state, lengths = garbage()
    values = {
        "length": 9, "last_token": 3, "num_output": 4, "top_k": 7, "min_tokens": 2,
        "temperature": 0.5, "top_p": 0.25, "min_p": 0.125, "presence": 1.5, "frequency": -0.5,
        "repetition": 2.0, "seed_low": 2**32 - 1, "seed_high": 5, "choice": 1,
    }  # fmt: skip
    packed = pack(2, **values)
    packed[len(ROW_COLUMNS)] = 11
    packed[len(ROW_COLUMNS) + MAX_BIASES] = np.float32(-1.25).view(np.int32)
    after, new_lengths = update(state, lengths, packed[None], None)
    after = jax.tree.map(np.asarray, after)
    seed = jax.random.wrap_key_data(np.array([5, 2**32 - 1], np.uint32))
    want = rows.RowState(
        **{k: v for k, v in values.items() if hasattr(state, k)},
        key=np.asarray(jax.random.key_data(jax.random.fold_in(seed, 1))),
        bias_id=np.array([11] + [VOCAB] * (MAX_BIASES - 1)),
        bias_value=np.array([-1.25] + [0.0] * (MAX_BIASES - 1)),
        allowed=np.full(3, 0xFFFFFFFF, np.uint32),
        banned_early=np.zeros(3),
        prompt_seen=np.zeros(3),
        counts=np.zeros(VOCAB),
    )
    others = [0, 1, 3, 4]
    jax.tree.map(lambda leaf, row: np.testing.assert_array_equal(leaf[2], row), after, want)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[others], b[others]), after, state)
    np.testing.assert_array_equal(new_lengths, [*lengths[:2], 9, *lengths[3:]])


def test_tables_come_with_their_row():
    state, lengths = garbage()
    tables = RowTables(
        allowed=rows.pack_bits([1, 69], VOCAB),
        banned_early=rows.pack_bits([2], VOCAB),
        prompt_seen=rows.pack_bits([0, 33], VOCAB),
        counts=np.arange(VOCAB, dtype=np.int16) + 32_000,
    )
    after, _ = update(state, lengths, pack(4)[None], tables)
    for name in ("allowed", "banned_early", "prompt_seen", "counts"):
        np.testing.assert_array_equal(getattr(after, name)[4], getattr(tables, name))
        np.testing.assert_array_equal(getattr(after, name)[:4], getattr(state, name)[:4])


@pytest.mark.parametrize("with_tables", [False, True])
def test_padding_rows_are_dropped(with_tables: bool):
    state, lengths = garbage()
    bits = np.zeros(3, np.uint32)
    tables = RowTables(bits, bits, bits, np.zeros(VOCAB, np.int16)) if with_tables else None
    packed = np.stack([pack(SLOTS, temperature=1.0, length=3)] * (1 if with_tables else 4))
    after, new_lengths = update(state, lengths, packed, tables)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    np.testing.assert_array_equal(new_lengths, lengths)


def test_several_rows_go_at_once():
    state, lengths = garbage()
    packed = np.stack([pack(i, last_token=10 + i, length=i) for i in (3, 0, SLOTS, 1)])
    after, new_lengths = update(state, lengths, packed, None)
    assert np.asarray(after.last_token)[[0, 1, 3]].tolist() == [10, 11, 13]
    assert np.asarray(new_lengths).tolist() == [0, 1, lengths[2], 3, lengths[4]]


def test_both_words_of_a_seed_and_the_choice_make_the_key():
    parts = ({}, {"seed_high": 1}, {"seed_low": 1}, {"seed_low": 2**31}, {"choice": 1})
    packed = np.stack([pack(i, **columns) for i, columns in enumerate(parts)])
    after, _ = update(*garbage(), packed, None)
    assert len({tuple(key) for key in np.asarray(after.key).tolist()}) == 5


@given(st.sets(st.integers(0, VOCAB - 1)))
def test_pack_and_unpack_bits_are_inverse(token_ids: set[int]):
    bits = rows.unpack_bits(rows.pack_bits(sorted(token_ids), VOCAB)[None], VOCAB)
    assert set(np.flatnonzero(np.asarray(bits)[0]).tolist()) == token_ids
