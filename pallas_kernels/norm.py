"""Normalisation."""

import jax
import jax.numpy as jnp
from jax import lax

from .reductions import sum_last


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    """x / rms(x) * weight over the last axis (Zhang and Sennrich 2019, eq. 4), in f32."""
    x = x.astype(jnp.float32)
    scale = lax.rsqrt(sum_last(x * x) / x.shape[-1] + epsilon)
    return x * scale * weight.astype(jnp.float32)
