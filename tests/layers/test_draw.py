"""The parts of sampling that need no batch of requests: argmax, draw, the uniform, logprobs."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quire.layers import sampling
from quire.layers.vocab import Vocabulary
from scipy.stats import chisquare

from .shards import BY_TOKEN, NUM_SHARDS, SAME, on_shards

SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=25 if NUM_SHARDS == 1 else 8, deadline=None)
ROWS = 64
NO_THRESHOLD = np.full(ROWS, -np.inf, np.float32)


@cache
def argmax() -> Any:
    return on_shards(lambda x, vocab: vocab.argmax(x), (BY_TOKEN,), SAME, fill=-np.inf)


@cache
def draw() -> Any:
    return on_shards(sampling.draw, (BY_TOKEN, SAME, SAME), SAME, fill=-np.inf)


@cache
def token_logprobs(k: int) -> Any:
    def program(x: Any, tokens: Any, vocab: Vocabulary) -> Any:
        return sampling.token_logprobs(x, tokens, k, vocab)

    return on_shards(program, (BY_TOKEN, SAME), SAME, fill=1e3)


uniforms = jax.jit(sampling._uniform)


def logits(rng: np.random.Generator, vocab: int) -> np.ndarray:
    x = rng.normal(0, 3, (ROWS, vocab)).astype(np.float32)
    x[rng.random((ROWS, vocab)) < 0.5] = -np.inf
    x[:, rng.integers(vocab)] = 0.0  # never all masked
    return x


@pytest.mark.parametrize("vocab", [1, 5, 128, 129, 1000])
def test_argmax_takes_the_lowest_of_equal_ids(vocab: int):
    x = np.random.default_rng(vocab).integers(0, 3, (ROWS, vocab)).astype(np.float32)
    x[0] = -np.inf  # nothing is left: still an id of the vocabulary
    got = argmax()(x)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, np.argmax(x, -1))


@pytest.mark.parametrize("vocab", [5, 128, 129, 1000])
@given(SEEDS)
@FEW
def test_draw_is_the_inverse_cdf_in_order_of_id(vocab: int, seed: int):
    rng = np.random.default_rng(seed)
    x = logits(rng, vocab)
    threshold = np.float32(rng.choice([-np.inf, -2.0], ROWS))
    uniform = rng.random(ROWS, np.float32)
    weights = np.where(x >= threshold[:, None], np.exp(x.astype(np.float64)), 0)
    ends = np.cumsum(weights / weights.sum(-1, keepdims=True), -1)
    tokens = np.asarray(draw()(x, threshold, uniform))
    rows = np.arange(ROWS)
    assert (weights[rows, tokens] > 0).all()
    before = np.where(tokens > 0, ends[rows, np.maximum(tokens - 1, 0)], 0)
    assert (before - 1e-5 <= uniform).all()
    assert (uniform <= ends[rows, tokens] + 1e-5).all()


def test_draw_takes_the_first_and_the_last_token_with_weight_at_the_ends():
    x = np.full((ROWS, 300), -np.inf, np.float32)
    x[:, [130, 131, 260]] = 0.0
    for uniform, token in [(0.0, 130), (0.34, 131), (np.nextafter(np.float32(1), 0), 260)]:
        assert (draw()(x, NO_THRESHOLD, np.full(ROWS, uniform, "f")) == token).all()


def test_draw_never_takes_a_token_without_weight():
    """Long running sums are rounded along a tree, so they rise by an ulp over blocks without weight
    (1200 blocks do it). A uniform in that gap drew a masked token, or one past the vocabulary.
    """
    num_blocks = 1200
    rng = np.random.default_rng(0)
    x = np.full((num_blocks, sampling.BLOCK), -np.inf, np.float32)
    blocks = np.flatnonzero(rng.random(num_blocks) < 0.5)
    x[blocks, 0] = rng.normal(0, 1, len(blocks))
    x -= x.max()
    parts = jnp.broadcast_to(jnp.exp(x[:, 0]), (16, num_blocks))
    ends = np.asarray(jax.jit(partial(jnp.cumsum, axis=-1))(parts))[0]
    rises = np.flatnonzero((np.diff(ends) > 0) & np.isinf(x[1:, 0]))[:16]
    assert len(rises)
    exact = (ends[rises] / ends[-1]).astype(np.float32)
    for uniforms in (exact, np.nextafter(exact, 2, dtype="f"), np.nextafter(exact, 0, dtype="f")):
        many = np.broadcast_to(x.reshape(1, -1), (len(rises), x.size))
        tokens = np.asarray(draw()(many, NO_THRESHOLD[: len(rises)], uniforms))
        assert np.isfinite(x.reshape(-1)[tokens]).all()


def test_draws_have_the_frequencies_of_the_probabilities():
    rng = np.random.default_rng(3)
    x = rng.normal(0, 1, 20).astype(np.float32)
    threshold = np.sort(x)[4]
    keys = np.stack([np.full(20_000, 7), np.arange(20_000)], -1).astype(np.uint32)
    uniform = uniforms(keys, np.arange(20_000, dtype=np.int32) % 50)
    many = np.broadcast_to(x, (20_000, 20))
    tokens = draw()(many, np.full(20_000, threshold), uniform)
    p = np.where(x >= threshold, np.exp(x.astype(float)), 0)
    counts = np.bincount(np.asarray(tokens), minlength=20)
    assert not counts[p == 0].any()
    expected = 20_000 * p[p > 0] / p.sum()
    assert chisquare(counts[p > 0], expected).pvalue > 1e-3


def test_the_uniform_depends_on_seed_choice_and_position_only():
    keys = np.array([[0, 1], [0, 2], [1, 1], [0, 1]], np.uint32)
    positions = np.array([0, 0, 0, 1], np.int32)
    uniform = np.asarray(uniforms(keys, positions))
    assert ((uniform >= 0) & (uniform < 1)).all()
    assert len(set(uniform.tolist())) == 4
    order = [2, 0, 3, 1]
    np.testing.assert_array_equal(uniforms(keys[order], positions[order]), uniform[order])
    want = jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(keys[3]), 1))
    assert uniform[3] == want


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("k", [0, 1, 20, 299, 300, 400])
def test_logprobs_and_ranks_are_those_of_the_raw_logits(k: int):
    rng = np.random.default_rng(k)
    x = np.round(rng.normal(0, 4, (ROWS, 300)), 1).astype(np.float32)  # with ties
    tokens = rng.integers(0, 300, ROWS).astype(np.int32)
    got = token_logprobs(k)(x, tokens)
    want = log_softmax(x)
    rows = np.arange(ROWS)
    np.testing.assert_allclose(got.chosen, want[rows, tokens], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got.rank, 1 + (x > x[rows, tokens][:, None]).sum(-1))
    assert got.top.shape == got.top_ids.shape == (ROWS, min(k, 300))
    if k >= 300:
        np.testing.assert_array_equal(got.top_ids, np.broadcast_to(np.arange(300), x.shape))
        np.testing.assert_allclose(got.top, want, rtol=1e-5, atol=1e-5)
    elif k:
        ordered = -np.sort(-want, -1)[:, :k]
        np.testing.assert_allclose(got.top, ordered, rtol=1e-5, atol=1e-5)
        at_ids = np.take_along_axis(want, np.asarray(got.top_ids), -1)
        np.testing.assert_allclose(got.top, at_ids, rtol=1e-5, atol=1e-5)
