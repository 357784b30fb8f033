"""The head that gives the highest logits alone, and what is sampled from them: to the bit what all
logits give.

Each of the levels that the processor has runs these tests: see test_native.py.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from quire.cpu_kernels import ops
from quire.cpu_kernels.library import Library, load
from quire.layers import highest, sampling
from quire.layers.filters import TOP
from quire.layers.highest import NUM_HIGHEST, HighestTokens
from quire.layers.rows import num_words
from quire.layers.vocab import Vocabulary
from quire.pallas_kernels.reductions import sum_last

from ..layers.test_sampling import Row, make_state
from .test_native import DTYPES, FEW, SEEDS, normal, packed

HIDDEN, ROWS = 32, 5
# Few sizes, or each example would be compiled. Blocks that are not full; one token left out.
VOCABS = st.sampled_from([NUM_HIGHEST + 1, 5000])


@pytest.fixture(scope="module")
def library() -> Library:
    found = load()
    assert isinstance(found, Library), found
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    SEEDS, st.sampled_from([1, 3, 16, 17, 40]), st.sampled_from([1, 32, 33, 250, 3000]),
    st.sampled_from([1, 2, 31, 65, 250]), st.sampled_from([1, 2, 5]),
)  # fmt: skip
@FEW
def test_the_head_finds_the_highest_in_order(
    library: Library, dtype: np.dtype, seed: int, rows: int, vocab: int, k: int, threads: int
):  # fmt: skip
    """Its logits are those of linear, bit for bit; equal ones are made by equal rows."""
    rng = np.random.default_rng(seed)
    k = min(k, vocab)
    x, matrix = normal(rng, rows, HIDDEN), normal(rng, vocab, HIDDEN, dtype=dtype)
    matrix[vocab // 2 :] = matrix[: vocab - vocab // 2]
    x[rng.integers(rows)] = 0.0  # all logits equal
    # One row's logits rise to the end: each replaces another.
    x[-1] = np.eye(1, HIDDEN)
    matrix[:, 0] = np.sort(matrix[:, 0].astype(np.float32)).astype(dtype)
    weight, _ = packed(matrix)
    library.set_threads(threads)
    try:
        values, ids, is_bad = ops.head_top_k(x, weight, vocab, k)
        want, want_ids = lax.top_k(ops.linear(x, weight, vocab), k)
        np.testing.assert_array_equal(values, want)
        np.testing.assert_array_equal(ids, want_ids)
        assert not np.asarray(is_bad).any()
        x[0, 5] = rng.choice([np.nan, np.inf])
        is_bad = ops.head_top_k(x, weight, vocab, k)[2]
        assert np.asarray(is_bad).tolist() == [1] + [0] * (rows - 1)
    finally:
        library.set_threads(1)


def test_more_logits_than_there_are_tokens_are_refused(library: Library):
    weight, _ = packed(np.ones((40, HIDDEN), np.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="takes a k from 1 to the vocabulary"):
        ops.head_top_k(jnp.ones((1, HIDDEN)), weight, 40, 41)[0].block_until_ready()


@cache
def sums(vocab: int) -> Any:
    """Over the vocabulary and of each block: of a few numbers, and of those among zeros."""

    def run(x: Any, ids: Any, whole: Any) -> Any:
        blocks = sampling._blocks(whole, 0.0)
        size = sampling.BLOCK
        return (
            HighestTokens(vocab, ids).sum(x), Vocabulary(vocab).sum(whole),
            ops.group_sums(x, ids // size, ids % size, blocks.shape[1], size),
            sum_last(blocks)[..., 0],
        )  # fmt: skip

    return jax.jit(run)


@given(SEEDS, VOCABS)
@FEW
def test_sums_of_a_few_are_those_among_zeros(library: Library, seed: int, vocab: int):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(vocab)[:NUM_HIGHEST] for _ in range(ROWS)]).astype(np.int32)
    x = rng.random(ids.shape, np.float32)
    x[rng.random(ids.shape) < 0.2] = 0.0
    whole = np.zeros((ROWS, vocab), np.float32)
    np.put_along_axis(whole, ids, x, axis=-1)
    few, all_, few_of_blocks, all_of_blocks = sums(vocab)(x, ids, whole)
    np.testing.assert_array_equal(few, all_)
    np.testing.assert_array_equal(few_of_blocks, all_of_blocks)


@cache
def both(vocab: int) -> Any:
    """Of logits, a state and the last slots, which are padding: what the tokens are from all logits
    and from the highest, and whether those are enough.
    """

    def run(logits: Any, state: Any, is_padding: Any) -> Any:
        at = jnp.arange(ROWS)
        mask = jnp.full((ROWS, num_words(vocab)), 0xFFFFFFFF, jnp.uint32)
        flags = jnp.array([0, 0, 1, 0])
        whole, _ = sampling.choose(logits, state, at, flags, mask, Vocabulary(vocab))
        top, ids = lax.top_k(logits, NUM_HIGHEST)
        return whole, *highest.choose(top, ids, state, at, is_padding, vocab)

    return jax.jit(run)


NO_PADDING = np.zeros(ROWS, bool)
KINDS = st.builds(
    Row,
    temperature=st.sampled_from([0.0, 1e-3, 0.3, 0.8, 1.0, 5.0]),
    top_k=st.integers(1, TOP),
    top_p=st.sampled_from([1.0, 1 - 2**-24, 0.9999, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


@given(SEEDS, VOCABS, st.lists(KINDS, min_size=ROWS, max_size=ROWS), st.sampled_from([0.1, 1, 4]))
@settings(max_examples=60, deadline=None)
def test_the_highest_give_the_tokens_that_all_give(
    library: Library, seed: int, vocab: int, kinds: list[Row], scale: float
):  # fmt: skip
    logits = normal(np.random.default_rng(seed), ROWS, vocab) * np.float32(scale)
    whole, few, is_whole = both(vocab)(logits, make_state(kinds, vocab, ROWS), NO_PADDING)
    # A tiny difference that a high temperature rounds away may leave the last two equal.
    if not is_whole:
        assert max(kind.top_k or 0 for kind in kinds) == TOP or scale == 0.1
        return
    np.testing.assert_array_equal(few, whole)


@pytest.mark.parametrize(
    ("kind", "is_whole"),
    [
        (Row(top_k=40), False),  # all that equal the 40th are kept
        (Row(top_k=9), True),
        (Row(temperature=0, top_k=40), True),
        (Row(temperature=0), True),
    ],
)
def test_ties_that_go_on_beyond_the_highest_are_seen(library: Library, kind: Row, is_whole: bool):
    vocab = 5000
    logits = np.zeros((ROWS, vocab), np.float32)
    logits[:, 100:110] = np.arange(1, 11)
    state = make_state([Row(top_k=1)] * (ROWS - 1) + [kind], vocab, ROWS)
    whole, few, found = both(vocab)(logits, state, NO_PADDING)
    assert bool(found) == is_whole
    if is_whole:
        np.testing.assert_array_equal(few, whole)
    # A padded row computes on the state of another one, which must not matter.
    assert both(vocab)(logits, state, np.arange(ROWS) == ROWS - 1)[2]


@pytest.mark.parametrize(
    ("kind", "is_served"),
    [
        (Row(top_k=1), True),
        (Row(top_k=TOP, top_p=0.5, min_p=0.1), True),
        (Row(temperature=0), True),
        (Row(temperature=0, top_k=TOP + 1), True),
        (Row(top_k=TOP + 1), False),
        (Row(top_k=None), False),
        (Row(top_p=0.5), False),
    ],
)
def test_rows_that_may_keep_more_are_not_served(kind: Row, is_served: bool):
    state = make_state([Row(top_k=3), kind], 200)
    at = jnp.array([0, 1])
    assert bool(highest.serves(state, at, jnp.array([False, False]))) == is_served
    assert bool(highest.serves(state, at, jnp.array([False, True])))
