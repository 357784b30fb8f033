"""Sums are right, and to the last bit whatever is summed beside them; top_k is that of a sort."""

import jax
import numpy as np
import pytest
from quire.pallas_kernels.reductions import _top_k_of_blocks, sum_last


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 576, 1500])
def test_sum_is_right_and_does_not_depend_on_the_rows(length: int) -> None:
    x = np.random.default_rng(length).normal(size=(64, length)).astype(np.float32)
    add = jax.jit(lambda x: sum_last(x * x))
    whole = np.asarray(add(x))
    expected = (x.astype(np.float64) ** 2).sum(-1, keepdims=True)
    np.testing.assert_allclose(whole, expected, rtol=1e-6)  # float32 adds of positive numbers
    for rows in (1, 2, 3, 8, 33):
        np.testing.assert_array_equal(np.asarray(add(x[:rows])), whole[:rows])


@pytest.mark.parametrize("k", [1, 5, 64])
@pytest.mark.parametrize("width", [64, 1000, 20_011])
@pytest.mark.parametrize("values", ["all", "few", "hidden"])
def test_the_highest_of_blocks_are_those_of_a_stable_sort(k: int, width: int, values: str) -> None:
    """Few distinct values: ties go by index, across blocks too. Hidden: most are -inf."""
    rng = np.random.default_rng(k * width)
    x = rng.normal(size=(3, width)).astype(np.float32)
    if values == "few":
        x = np.round(x) + np.float32(0)  # no negative zeros, which lax.top_k puts lower
    elif values == "hidden":
        x[rng.random(x.shape) < 1 - 2 / width] = -np.inf
    top, ids = jax.jit(_top_k_of_blocks, static_argnums=1)(x, k)
    expected = np.argsort(-x, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(top, np.take_along_axis(x, expected, axis=-1))
