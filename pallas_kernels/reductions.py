"""Sums whose order of addition depends on nothing but the length of what is summed; and argmax.

XLA's own reduction adds in another order for 8 rows than for 64 (seen on CPU), which would make a
request's numbers depend on its batch.
"""

import jax
import jax.numpy as jnp
from jax import lax

_TERMS = 32  # numbers added up by one kernel
_BLOCK = 128


def sum_last(x: jax.Array) -> jax.Array:
    """Sum over the last axis, which is kept with size 1."""
    # On a GPU a reduction becomes one kernel with what stands around it, halves many.
    return lax.platform_dependent(x, cuda=lambda x: x.sum(-1, keepdims=True), default=_by_halves)


def _by_halves(x: jax.Array) -> jax.Array:
    """Halves are added until one is left."""
    while x.shape[-1] > 1:
        terms = min(_TERMS, 1 << (x.shape[-1] - 1).bit_length())
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % terms)])
        width = x.shape[-1] // terms
        while x.shape[-1] > width:
            low, high = jnp.split(x, 2, axis=-1)
            x = low + high
        # A barrier, or the levels become one kernel that loads everything for each number.
        x = lax.optimization_barrier(x)
    return x


def argmax(x: jax.Array) -> jax.Array:
    """i32[rows]: the lowest index of the highest value, in two levels (plain argmax is far slower
    on CPU).
    """
    x = jnp.pad(x, ((0, 0), (0, -x.shape[-1] % _BLOCK)), constant_values=-jnp.inf)
    blocks = x.reshape(x.shape[0], -1, _BLOCK)
    best = jnp.argmax(blocks.max(-1), axis=-1)
    inside = jnp.take_along_axis(blocks, best[:, None, None], axis=1)[:, 0]
    return (best * _BLOCK + jnp.argmax(inside, axis=-1)).astype(jnp.int32)
