"""Sums whose order of addition depends on nothing but the length of what is summed; the highest of
many.

XLA's own reduction adds in another order for 8 rows than for 64 (seen on CPU), which would make a
request's numbers depend on its batch.
"""

import jax
import jax.numpy as jnp
from jax import lax

# Numbers added up by one kernel: of what is longer, those first that are an even part of it apart.
FIRST_TERMS = 32
_BLOCK = 128
_TOP_K_BLOCKS = (128, 16)


def sum_last(x: jax.Array) -> jax.Array:
    """Sum over the last axis, which is kept with size 1."""
    # On a GPU a reduction becomes one kernel with what stands around it, halves many.
    return lax.platform_dependent(x, cuda=lambda x: x.sum(-1, keepdims=True), default=_by_halves)


def _by_halves(x: jax.Array) -> jax.Array:
    """Halves are added until one is left."""
    while x.shape[-1] > 1:
        terms = min(FIRST_TERMS, 1 << (x.shape[-1] - 1).bit_length())
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


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """f32[rows, k] and i32[rows, k]: the k highest of x [rows, width], falling, and their indices;
    of equals the lower index first.
    """
    return lax.platform_dependent(
        x, cuda=lambda x: _top_k_of_blocks(x, k), default=lambda x: tuple(lax.top_k(x, k))
    )


def _top_k_of_blocks(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """In levels, where lax.top_k would sort all of x: what is wanted is in the k blocks with the
    highest maxima. Of blocks with equal ones the first are taken, and they stay in order, so that
    equals do too.
    """
    ids = jnp.broadcast_to(jnp.arange(x.shape[-1], dtype=jnp.int32), x.shape)
    for width in _TOP_K_BLOCKS:
        if x.shape[-1] < 2 * k * width:
            continue
        missing = -x.shape[-1] % width
        x = jnp.pad(x, ((0, 0), (0, missing)), constant_values=-jnp.inf)
        ids = jnp.pad(ids, ((0, 0), (0, missing)))
        blocks, block_ids = (a.reshape(a.shape[0], -1, width) for a in (x, ids))
        _, best = lax.top_k(blocks.max(-1), k)
        at = jnp.sort(best, axis=-1)[:, :, None]
        x, ids = (
            jnp.take_along_axis(a, at, axis=1).reshape(a.shape[0], -1) for a in (blocks, block_ids)
        )
    values, at = lax.top_k(x, k)
    return values, jnp.take_along_axis(ids, at, axis=-1)
