"""Which tokens of a row min-p, top-k and top-p leave: a threshold on its logits.

A filter keeps every token whose logit is at least that of the last one it needs, so ties are all
kept. The last one is almost always among the TOP highest; where it is not, it is searched for bit
by bit, which takes sums over the vocabulary and neither sorts nor gathers it.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

TOP = 64  # of the highest logits, looked at before the whole vocabulary

_MASKED = -jnp.inf
_BITS = 32


class Summary(Protocol):
    """What is asked of all tokens: see Vocabulary."""

    @property
    def size(self) -> int: ...

    def top(self, x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]: ...

    def sum(self, x: jax.Array) -> jax.Array: ...


def filter_threshold(
    x: jax.Array,  # f32[rows, width], after temperature
    top_k: jax.Array,  # i32[rows], vocab if off
    top_p: jax.Array,  # f32[rows], 1 if off
    min_p: jax.Array,  # f32[rows], 0 if off
    vocab: Summary,
) -> jax.Array:  # f32[rows]
    """The lowest logit that min-p, top-k and top-p (each over what the former left) keep."""
    near, _ = vocab.top(x, min(TOP, vocab.size))
    highest = near[:, 0]
    floor = highest + jnp.log(min_p)  # -inf if off
    cut = jnp.maximum(floor, _top_k_threshold(x, near, top_k, floor, vocab))

    def weights(x: jax.Array) -> jax.Array:
        return jnp.where(x >= cut[:, None], jnp.exp(x - highest[:, None]), 0.0)

    wanted = top_p * vocab.sum(weights(x))
    parts = weights(near)
    ends = jnp.cumsum(parts, axis=-1)
    # The first token is always kept; another one while what came before it is short of top_p.
    is_kept = (ends - parts < wanted[:, None]) | (jnp.arange(near.shape[-1]) == 0)
    lowest = jnp.where(is_kept, near, jnp.inf).min(-1)
    is_short = (top_p < 1) & (ends[:, -1] < wanted)
    lowest = lax.cond(
        is_short.any(),
        lambda x: jnp.where(is_short, _last_needed(x, weights(x), wanted, vocab), lowest),
        lambda x: lowest,
        x,
    )
    # At 1 the rounding of the sums must not cut the tail.
    return jnp.where(top_p >= 1, cut, jnp.maximum(lowest, cut))


def _top_k_threshold(
    x: jax.Array,  # f32[rows, width]
    near: jax.Array,  # f32[rows, n], the highest of the row
    top_k: jax.Array,
    floor: jax.Array,  # f32[rows]
    vocab: Summary,
) -> jax.Array:
    """f32[rows]: the k-th highest logit; -inf if off; any below the floor if that one is."""
    at = jnp.clip(top_k - 1, 0, near.shape[-1] - 1)[:, None]
    kth = jnp.take_along_axis(near, at, axis=-1)[:, 0]
    is_off = top_k >= vocab.size
    is_far = (top_k > TOP) & ~is_off & (near[:, -1] >= floor)
    kth = lax.cond(
        is_far.any(),
        lambda x: jnp.where(
            is_far, _last_needed(x, jnp.ones_like(x), top_k.astype(x.dtype), vocab), kth
        ),
        lambda x: kth,
        x,
    )
    return jnp.where(is_off, _MASKED, kth)


def _last_needed(
    x: jax.Array,  # f32[rows, width]
    weights: jax.Array,  # f32[rows, width], none negative
    wanted: jax.Array,  # f32[rows]
    vocab: Summary,
) -> jax.Array:
    """f32[rows]: the highest value for which the weights of all x from there on reach what is
    wanted.

    Floats ordered as integers, found from the highest bit down. A sum of more weights is never the
    lower one, rounded as it may be: its order of addition is fixed.
    """

    def add_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        higher = found | jnp.uint32(1) << (_BITS - 1 - i).astype(jnp.uint32)
        reached = vocab.sum(jnp.where(x >= _real(higher)[:, None], weights, 0.0))
        return jnp.where(reached >= wanted, higher, found)

    return _real(lax.fori_loop(0, _BITS, add_bit, jnp.zeros(x.shape[0], jnp.uint32)))


def _real(order: jax.Array) -> jax.Array:
    """f32 from its place in the order of all, u32: negative ones have their bits turned over."""
    sign = jnp.uint32(1 << 31)
    value = lax.bitcast_convert_type(jnp.where(order < sign, ~order, order ^ sign), jnp.float32)
    # What comes before -inf is no number, and as low as that.
    return jnp.where((order < sign) & jnp.isnan(value), -jnp.inf, value)
