"""A weight for the GPU's kernel multiplies as one for XLA does: with few tokens by the kernel
(interpreted here), with many by XLA itself.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quire.layers.dense_gpu import GpuWeight
from quire.layers.linear import DenseWeight, Norm
from quire.pallas_kernels.linear_gpu import Kernel
from quire.pallas_kernels.tuning import load

HIDDEN, INNER = 64, 128
KERNEL = Kernel(replace(load("h200"), num_sms=1), is_interpreted=True)
COUNT = jnp.int32(1)


@pytest.fixture(autouse=True)
def _fresh_interpreter() -> Iterator[None]:
    yield
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import gpu_callbacks

    gpu_callbacks.reset_gpu_interpret_mode_state()


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def gated(wrap: Callable[..., Any], x: jax.Array, dtype: Any) -> jax.Array:
    up = wrap(normal(1, 2 * INNER, HIDDEN, dtype=dtype) / 8)
    down = wrap(normal(2, HIDDEN, INNER, dtype=dtype) / 8)
    bias = normal(3, 2 * INNER, dtype=dtype)
    norm = Norm(normal(4, HIDDEN, dtype=dtype), 1e-6)
    return up.gated_mlp(x, bias, norm, down, None, COUNT, None)


def product(wrap: Callable[..., Any], x: jax.Array, dtype: Any) -> jax.Array:
    w, bias = wrap(normal(5, 32, HIDDEN, dtype=dtype) / 8), normal(6, 32, dtype=dtype)
    return w.product(x, bias, residual=normal(7, x.shape[0], 32))


def exact(wrap: Callable[..., Any], x: jax.Array, dtype: Any) -> jax.Array:
    w = wrap(normal(8, 48, HIDDEN, dtype=dtype) / 8)
    return w.exact_product(x, None, Norm(normal(9, HIDDEN, dtype=dtype), 1e-6), COUNT)


def highest(wrap: Callable[..., Any], x: jax.Array, dtype: Any) -> jax.Array:
    return jnp.stack(wrap(normal(10, 512, HIDDEN, dtype=dtype)).highest(x))


def by_kernel(w: jax.Array) -> GpuWeight:
    return GpuWeight(w, KERNEL)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("method", [product, exact, gated, highest])
def test_few_tokens_are_multiplied_by_the_kernel(method: Callable[..., Any], dtype: Any) -> None:
    x = normal(11, 9, HIDDEN)
    made = np.asarray(jax.jit(lambda x: method(by_kernel, x, dtype))(x))
    wanted = np.asarray(jax.jit(lambda x: method(DenseWeight, x, dtype))(x))
    # Sums in another order; what is between the two products of an MLP is rounded to 16 bits.
    tolerance = 0.02 if method is gated else 1e-5
    np.testing.assert_allclose(made, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", [product, exact, gated, highest])
def test_many_tokens_are_multiplied_by_xla(
    method: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kernel, "run", lambda *_: pytest.fail("it ran"))
    x = normal(12, 65, HIDDEN)
    made, wanted = (method(wrap, x, jnp.bfloat16) for wrap in (by_kernel, DenseWeight))
    np.testing.assert_array_equal(np.asarray(made), np.asarray(wanted))
