"""Normalisation."""

import jax
import jax.numpy as jnp
from jax import lax

_TERMS = 32  # numbers added one by one in one kernel


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    """x / rms(x) * weight over the last axis (Zhang and Sennrich 2019, eq. 4), in f32."""
    x = x.astype(jnp.float32)
    scale = lax.rsqrt(_sum_last(x * x) / x.shape[-1] + epsilon)
    return x * scale * weight.astype(jnp.float32)


def _sum_last(x: jax.Array) -> jax.Array:
    """Sum over the last axis, kept as 1, in an order that does not depend on the other axes.

    XLA's own reduction adds in another order for 8 rows than for 64 (seen on CPU), which would make
    a request's result depend on its batch.
    """
    while x.shape[-1] > 1:
        missing = -x.shape[-1] % _TERMS if x.shape[-1] > _TERMS else 0
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
        width = max(1, x.shape[-1] // _TERMS)
        terms = [x[..., i : i + width] for i in range(0, x.shape[-1], width)]
        # A barrier, or the levels become one kernel that loads everything for each number.
        x = lax.optimization_barrier(sum(terms[1:], terms[0]))
    return x
