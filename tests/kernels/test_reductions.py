"""Sums are right, and the same to the last bit however many rows are summed at once."""

import jax
import numpy as np
import pytest
from quire.pallas_kernels.reductions import sum_last


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 576, 1500])
def test_sum_is_right_and_does_not_depend_on_the_rows(length: int) -> None:
    x = np.random.default_rng(length).normal(size=(64, length)).astype(np.float32)
    add = jax.jit(lambda x: sum_last(x * x))
    whole = np.asarray(add(x))
    expected = (x.astype(np.float64) ** 2).sum(-1, keepdims=True)
    np.testing.assert_allclose(whole, expected, rtol=1e-6)  # float32 adds of positive numbers
    for rows in (1, 2, 3, 8, 33):
        np.testing.assert_array_equal(np.asarray(add(x[:rows])), whole[:rows])
