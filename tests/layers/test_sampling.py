"""sample() against a float64 oracle in numpy, written from the documented order: masks and logit
bias, penalties, temperature, min-p, top-k, top-p, draw.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from quire.layers import sampling
from quire.layers.filters import TOP, filter_threshold
from quire.layers.linear import DenseWeight
from quire.layers.rows import MAX_BIASES, RowState, num_words, pack_bits, row_partition
from quire.layers.vocab import Vocabulary

from .shards import BY_TOKEN, NUM_SHARDS, SAME, on_shards

VOCAB = 200  # two blocks, the second not full
SLOTS = 8
SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=25 if NUM_SHARDS == 1 else 8, deadline=None)
NUM_FLAGS = 4


@dataclass(frozen=True)
class Row:
    """What a request asks; None and the like are off."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    bias: tuple[tuple[int, float], ...] = ()
    allowed: tuple[int, ...] | None = None
    banned_early: tuple[int, ...] = ()
    min_tokens: int = 0
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    seed: int = 1
    choice: int = 0

    def key(self) -> np.ndarray:
        words = np.array([self.seed >> 32, self.seed & 0xFFFFFFFF], np.uint32)
        return np.asarray(
            jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(words), self.choice))
        )


def make_state(rows: list[Row], vocab: int = VOCAB, slots: int = SLOTS) -> RowState:
    """Row i in slot i; the slots after them hold the last row again."""
    rows = rows + rows[-1:] * (slots - len(rows))
    everything = range(vocab)

    def column(name: str, dtype: Any = np.float32) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], dtype)

    bias_id = np.full((slots, MAX_BIASES), vocab, np.int32)
    bias_value = np.zeros((slots, MAX_BIASES), np.float32)
    for i, row in enumerate(rows):
        for j, (token, value) in enumerate(row.bias):
            bias_id[i, j], bias_value[i, j] = token, value
    return RowState(
        last_token=np.zeros(slots, np.int32),
        num_output=np.array([len(row.output) for row in rows], np.int32),
        key=np.stack([row.key() for row in rows]),
        temperature=column("temperature"),
        top_p=column("top_p"),
        top_k=np.array([vocab if row.top_k is None else row.top_k for row in rows], np.int32),
        min_p=column("min_p"),
        presence=column("presence"),
        frequency=column("frequency"),
        repetition=column("repetition"),
        min_tokens=column("min_tokens", np.int32),
        bias_id=bias_id,
        bias_value=bias_value,
        allowed=np.stack(
            [pack_bits(everything if r.allowed is None else r.allowed, vocab) for r in rows]
        ),
        banned_early=np.stack([pack_bits(row.banned_early, vocab) for row in rows]),
        prompt_seen=np.stack([pack_bits(row.prompt, vocab) for row in rows]),
        counts=np.stack(
            [np.bincount(np.array(r.output, int), minlength=vocab) for r in rows]
        ).astype(np.int16),
    )


@cache
def compiled() -> Any:
    state = row_partition()
    return on_shards(
        sampling.sample,
        (BY_TOKEN, state, SAME, SAME, BY_TOKEN),
        (SAME, state),
        fill=1e3,  # of a padded head: finite, and never to be seen
    )


def run(
    logits: np.ndarray, state: RowState, slots: Any, flags: Any = (1, 1, 1, 0), mask: Any = None
) -> tuple[np.ndarray, np.ndarray, RowState]:
    """Tokens, flags and the new state, in numpy."""
    rows, vocab = logits.shape
    if mask is None:
        mask = np.full((rows, num_words(vocab)), 0xFFFFFFFF, np.uint32)
    sampled, state = compiled()(
        logits, state, np.array(slots, np.int32), np.array(flags, np.int32), mask
    )
    both = np.asarray(sampled.token_and_flag)
    np.testing.assert_array_equal(both[0], sampled.token)
    return both[0], both[1], jax.tree.map(np.asarray, state)


def adjust(logits: np.ndarray, row: Row, step_allowed: np.ndarray | None = None) -> np.ndarray:
    """Masks, logit bias and penalties, in float64; masked tokens are -inf."""
    x = logits.astype(np.float64)
    for token, value in row.bias:
        x[token] += value
    is_allowed = np.ones(len(x), bool)
    if row.allowed is not None:
        is_allowed[:] = False
        is_allowed[list(row.allowed)] = True
    if len(row.output) < row.min_tokens:
        is_allowed[list(row.banned_early)] = False
    if step_allowed is not None:
        is_allowed &= step_allowed
    counts = np.bincount(np.array(row.output, int), minlength=len(x))
    seen = counts > 0
    seen[list(row.prompt)] = True
    x = np.where(seen, np.where(x > 0, x / row.repetition, x * row.repetition), x)
    x = x - row.frequency * counts - row.presence * (counts > 0)
    return np.where(is_allowed, x, -np.inf)


def keep(x: np.ndarray, row: Row, top_p: float) -> np.ndarray:
    """bool[vocab]: what min-p, top-k and top-p leave of scaled logits, ties included."""
    left = x >= x.max() + np.log(row.min_p) if row.min_p else np.isfinite(x)
    if row.top_k is not None:
        left &= x >= np.sort(x)[::-1][row.top_k - 1]
    if top_p < 1:
        weights = np.where(left, np.exp(x - x.max()), 0)
        ordered = np.sort(weights / weights.sum())[::-1]
        num_needed = int(np.searchsorted(np.cumsum(ordered), top_p)) + 1
        left &= x >= np.sort(x)[::-1][min(num_needed, len(x)) - 1]
    return left


def probabilities(logits: np.ndarray, row: Row, allowed: np.ndarray | None = None) -> np.ndarray:
    x = adjust(logits, row, allowed)
    x = (x - x.max()) / row.temperature
    kept = keep(x, row, row.top_p)
    # Too close to call in float32: leave such an example out.
    for nearby in (row.top_p - 2e-5, row.top_p + 2e-5):
        assume(row.top_p == 1 or (keep(x, row, nearby) == kept).all())
    weights = np.where(kept, np.exp(x), 0)
    return weights / weights.sum()


def assert_drawn(token: int, p: np.ndarray, uniform: float) -> None:
    """The token's interval of the CDF, in order of id, holds the uniform (to f32 rounding)."""
    assert p[token] > 0
    end = np.cumsum(p)[token]
    assert end - p[token] - 1e-5 <= uniform <= end + 1e-5


def uniform_of(row: Row) -> float:
    key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(row.key())), len(row.output))
    return float(jax.random.uniform(key))


tokens = st.integers(0, VOCAB - 1)
rows_of_all_kinds = st.builds(
    Row,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([None, 1, 5, 63, 64, 65, 150]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 1e-4, 0.05, 1.0]),
    presence=st.sampled_from([0.0, 1.5, -2.0]),
    frequency=st.sampled_from([0.0, 0.7, -0.5]),
    repetition=st.sampled_from([1.0, 1.3, 0.8]),
    bias=st.dictionaries(tokens, st.floats(-5, 5, width=32), max_size=4).map(
        lambda b: tuple(b.items())
    ),
    allowed=st.none() | st.sets(tokens, min_size=1).map(lambda s: tuple(sorted(s))),
    min_tokens=st.integers(0, 4),
    prompt=st.lists(tokens, max_size=5).map(tuple),
    output=st.lists(st.integers(0, 9), max_size=6).map(tuple),
    seed=st.integers(0, 2**64 - 1),
    choice=st.integers(0, 3),
)  # fmt: skip


def some_logits(rng: np.random.Generator, count: int, vocab: int = VOCAB) -> np.ndarray:
    """Flat and peaked rows, some on a coarse grid so that they are full of ties."""
    x = rng.normal(0, 1, (count, vocab)) * rng.choice([0.3, 1, 4], (count, 1))
    is_tied = rng.random((count, 1)) < 0.4
    return np.where(is_tied, np.round(x * 2) / 2, x).astype(np.float32)


@given(st.lists(rows_of_all_kinds, min_size=1, max_size=SLOTS), SEEDS)
@FEW
def test_sample_follows_the_oracle(rows: list[Row], seed: int):
    rng = np.random.default_rng(seed)
    logits = some_logits(rng, SLOTS)
    step_allowed = rng.random((SLOTS, VOCAB)) < 0.9
    for i, row in enumerate(rows):
        step_allowed[i, list(row.allowed or [0])] = True
    mask = np.stack([pack_bits(np.flatnonzero(a), VOCAB) for a in step_allowed])
    slots = np.arange(SLOTS)
    slots[len(rows) :] = SLOTS
    state = make_state(rows)
    got, bad, after = run(logits, state, slots, mask=mask)
    assert not bad[: len(rows)].any()
    for i, row in enumerate(rows):
        if row.temperature == 0:
            x = adjust(logits[i], row, step_allowed[i]).astype(np.float32)
            assert x[got[i]] >= x.max() - 1e-5
        else:
            assert_drawn(got[i], probabilities(logits[i], row, step_allowed[i]), uniform_of(row))
        assert after.last_token[i] == got[i]
        assert after.num_output[i] == len(row.output) + 1
        want = np.bincount([*row.output, got[i]], minlength=VOCAB)
        np.testing.assert_array_equal(after.counts[i], want)


@pytest.mark.parametrize("vocab", [VOCAB, 40])
@given(st.lists(rows_of_all_kinds, min_size=SLOTS, max_size=SLOTS), SEEDS)
@FEW
def test_filters_keep_what_the_oracle_keeps(vocab: int, rows: list[Row], seed: int):
    x = some_logits(np.random.default_rng(seed), SLOTS, vocab)
    x -= x.max(-1, keepdims=True)
    rows = [replace(r, top_k=None if (r.top_k or 0) > vocab else r.top_k) for r in rows]
    threshold = np.asarray(
        _thresholds()(
            x,
            np.array([row.top_k or vocab for row in rows], np.int32),
            np.array([row.top_p for row in rows], np.float32),
            np.array([row.min_p for row in rows], np.float32),
        )
    )
    for i, row in enumerate(rows):
        wide = x[i].astype(np.float64)
        kept = keep(wide, row, row.top_p)
        if any((keep(wide, row, row.top_p + d) != kept).any() for d in (-2e-5, 2e-5)):
            continue
        np.testing.assert_array_equal(x[i] >= threshold[i], kept)


@cache
def _thresholds() -> Any:
    return on_shards(filter_threshold, (BY_TOKEN, SAME, SAME, SAME), SAME, fill=-np.inf)


def test_top_k_of_exactly_the_window_filters_and_renormalises():
    """top_k = 64 filled the window of the 64 highest, which was taken for 'nothing is cut': the
    filter did nothing, and top-p was of the mass of the whole vocabulary.
    """
    x = np.linspace(0, -2, VOCAB, dtype=np.float32)[None]
    for top_p in (1.0, 0.5):
        threshold = _thresholds()(
            x, np.array([TOP], np.int32), np.float32([top_p]), np.float32([0])
        )
        row = Row(top_k=TOP, top_p=top_p)
        assert (x[0] >= threshold[0]).sum() == keep(x[0].astype(float), row, top_p).sum()


def test_ties_at_every_threshold_are_all_kept():
    x = np.array([[0.0] * 3 + [-1.0] * 100 + [-2.0] * 97], np.float32)
    for row, num_kept in [
        (Row(top_k=1), 3),
        (Row(top_k=3), 3),
        (Row(top_k=4), 103),  # the ties of the fourth reach past the 64 highest
        (Row(min_p=float(np.exp(-1.0)) * 0.999), 103),
        (Row(top_p=0.05), 3),
        (Row(top_p=0.1), 103),
        (Row(top_k=4, top_p=0.07), 3),  # 3 of 39.8 is 0.0754
        (Row(top_k=4, top_p=0.08), 103),
    ]:
        kept = keep(x[0].astype(float), row, row.top_p)
        assert kept.sum() == num_kept
        arguments = np.array([row.top_k or VOCAB]), np.float32([row.top_p]), np.float32([row.min_p])
        np.testing.assert_array_equal(x[0] >= _thresholds()(x, *arguments)[0], kept)


MIXED = [
    Row(temperature=0.0),
    Row(seed=2),
    Row(seed=3, top_k=100),  # past the 64 highest: searched for
    Row(seed=4, top_p=0.95, temperature=2.0),  # flat: needs more than 64
    Row(seed=5, top_k=3, top_p=0.5),
    Row(seed=6, min_p=0.02),
    Row(seed=7, frequency=1.0, output=(1, 2, 2)),
    Row(seed=8, allowed=(7, 9, 150)),
]


def test_each_row_of_a_mixed_batch_is_the_row_alone():
    logits = some_logits(np.random.default_rng(0), SLOTS)
    logits[3] = np.linspace(0, 1, VOCAB)
    assert keep(logits[3] / 2, MIXED[3], MIXED[3].top_p).sum() > TOP
    state = make_state(MIXED)
    together, _, _ = run(logits, state, range(SLOTS))
    for i, row in enumerate(MIXED):
        slots = np.full(SLOTS, SLOTS)
        slots[i] = i
        has_penalties, has_filters = (
            bool(row.frequency),
            bool(row.top_k or row.top_p < 1 or row.min_p),
        )
        flags = (row.allowed is not None, has_penalties, has_filters, 0)
        # Its neighbours are idle, and read whatever the last slot holds.
        alone, _, _ = run(logits, state, slots, flags)
        assert alone[i] == together[i]
        elsewhere, _, _ = run(np.roll(logits, 3, 0), state, np.roll(np.arange(SLOTS), 3))
        assert elsewhere[(i + 3) % SLOTS] == together[i]


@cache
def greedy() -> Any:
    def sample(logits: Any, state: RowState, slots: Any, vocab: Vocabulary) -> Any:
        if vocab.axis is None:  # as the head tells it
            best = DenseWeight(jnp.eye(VOCAB)).highest(jnp.asarray(logits))
        else:
            best = vocab.highest(logits)
        return sampling.sample_greedy(*best, state, slots)

    state = row_partition()
    return on_shards(sample, (BY_TOKEN, state, SAME), (SAME, state), fill=1e3)


def test_idle_rows_change_no_state():
    state = make_state(MIXED)
    logits = some_logits(np.random.default_rng(0), SLOTS)
    mask = np.full((SLOTS, num_words(VOCAB)), 0xFFFFFFFF, np.uint32)
    flags = np.ones(NUM_FLAGS, np.int32)
    for sample, more in ((compiled(), (flags, mask)), (greedy(), ())):
        _, after = sample(logits, state, np.full(SLOTS, SLOTS, np.int32), *more)
        jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_flags_only_itself(poison: float):
    logits = some_logits(np.random.default_rng(0), SLOTS)
    clean, none_bad, _ = run(logits, make_state(MIXED), range(SLOTS))
    assert not none_bad.any()
    logits[4, 11] = poison
    got, bad, _ = run(logits, make_state(MIXED), range(SLOTS))
    assert bad.tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    np.testing.assert_array_equal(np.delete(got, 4), np.delete(clean, 4))
    chosen, _ = greedy()(logits, make_state(MIXED), np.arange(SLOTS))
    assert chosen.token_and_flag[1].tolist() == bad.tolist()


@pytest.mark.parametrize(
    "row",
    [
        Row(allowed=()),
        Row(temperature=0.0, allowed=()),
        Row(allowed=(3,), banned_early=(3,), min_tokens=1),
        Row(bias=((3, 3e38), (4, 3e38)), repetition=1e-30, prompt=(3,)),  # leaves f32
    ],
)
def test_a_row_that_can_give_no_token_is_flagged(row: Row):
    rows = [Row(), row, Row()]
    logits = np.ones((SLOTS, VOCAB), np.float32)
    _, bad, _ = run(logits, make_state(rows), [0, 1, 2, *[SLOTS] * 5])
    assert bad[:3].tolist() == [0, 1, 0]
