"""The vocabulary axis of logits, whole on one device or split over the mesh's model axis.

Everything sampling asks of all logits of a row at once is asked here, so that no device ever holds
more of them than its own: each shard sums up its part to a few numbers, and those are gathered and
combined in the order of the shards. A shard's columns begin at a word of the masks; those past the
vocabulary are padding.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from ..pallas_kernels.reductions import argmax, sum_last, top_k

WORD = 32  # bits of one word of a mask


def padded_vocab(vocab: int, num_shards: int) -> int:
    """Columns of all shards: whole words on each, and none too many on one device."""
    return vocab if num_shards == 1 else -(-vocab // (WORD * num_shards)) * WORD * num_shards


def local_ids(ids: jax.Array, width: int, axis: str | None) -> jax.Array:
    """Token ids as columns of this shard; `width`, past the last one, for those of another."""
    if axis is None:
        return ids
    # An id of another shard must not wrap around.
    local = ids - lax.axis_index(axis) * width
    return jnp.where((local >= 0) & (local < width), local, width)


@dataclass(frozen=True)
class Vocabulary:
    """size: without padding. axis: of the mesh; None: every array is whole.

    Arrays x: [rows, width], this shard's columns. All results are the same on every shard.
    """

    size: int
    axis: str | None = None

    def local(self, ids: jax.Array, width: int) -> jax.Array:
        return local_ids(ids, width, self.axis)

    def hide_padding(self, x: jax.Array) -> jax.Array:
        """x with -inf in the columns past the vocabulary."""
        if self.axis is None:
            return x
        is_token = self._first(x) + jnp.arange(x.shape[-1]) < self.size
        return jnp.where(is_token, x, -jnp.inf)

    def max(self, x: jax.Array) -> jax.Array:
        """f32[rows]"""
        highest = x.max(-1)
        return highest if self.axis is None else lax.pmax(highest, self.axis)

    def sum(self, x: jax.Array) -> jax.Array:
        """f32[rows], added in an order that depends on nothing but the widths."""
        sums = sum_last(x)[:, 0]
        return sums if self.axis is None else sum_last(self._gathered(sums))[:, 0]

    def count(self, x: jax.Array) -> jax.Array:
        """i32[rows]: columns of bool x that are true."""
        count = x.sum(-1, dtype=jnp.int32)
        return count if self.axis is None else lax.psum(count, self.axis)

    def pick(self, x: jax.Array, ids: jax.Array) -> jax.Array:
        """f32[rows]: x at ids i32[rows]."""
        if self.axis is None:
            return jnp.take_along_axis(x, ids[:, None], axis=-1, mode="clip")[:, 0]
        at = self.local(ids, x.shape[-1])[:, None]
        mine = jnp.take_along_axis(x, at, axis=-1, mode="fill", fill_value=0)
        return lax.psum(mine[:, 0], self.axis)

    def argmax(self, x: jax.Array) -> jax.Array:
        """i32[rows]: the lowest id of the highest value."""
        return argmax(x) if self.axis is None else self._highest(x, x.max(-1))[0]

    def highest(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """i32[rows], the lowest id of the highest logit; i32[rows], 1 if any is not finite: one
        gather of two numbers of each shard.
        """
        is_bad = ~jnp.isfinite(logits).all(-1)
        logits = self.hide_padding(logits)
        if self.axis is None:
            return argmax(logits), is_bad.astype(jnp.int32)
        # A shard with a logit that is not finite says so in place of its highest one.
        ids, values = self._highest(logits, jnp.where(is_bad, jnp.nan, logits.max(-1)))
        return ids, jnp.isnan(values).any(-1).astype(jnp.int32)

    def top(self, x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """f32[rows, k] and i32[rows, k]: the k highest, descending, of equal ones the lowest ids,
        and their ids. k up to the vocabulary.
        """
        if self.axis is None:
            return _top_k(x, k)
        # A shard's own k highest are enough, and in the order of the shards ties stay in order.
        top, columns = _top_k(x, min(k, x.shape[-1]))
        both = _bits(top), columns + self._first(x)
        values, ids = lax.all_gather(jnp.stack(both), self.axis, axis=2, tiled=True)
        top, at = _top_k(_real(values), k)
        return top, jnp.take_along_axis(ids, at, axis=-1)

    def gather(self, x: jax.Array) -> jax.Array:
        """[rows, size], all of x: for whoever asked for all of it."""
        if self.axis is None:
            return x
        return lax.all_gather(x, self.axis, axis=1, tiled=True)[:, : self.size]

    def locate(self, totals: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Where the sum over all columns reaches uniform of its end: how much of that is this
        shard's, f32[rows], and whether it is reached on this shard, bool[rows] (None: of course).

        totals: f32[rows], the sums of this shard.
        """
        if self.axis is None:
            return uniform * totals, None
        parts = self._gathered(totals)
        ends = jnp.cumsum(parts, axis=-1)
        target = uniform * ends[:, -1]
        shard = first_above(ends, target, parts)
        mine = lax.axis_index(self.axis)
        before = jnp.where(mine > 0, ends[:, jnp.maximum(mine - 1, 0)], 0.0)
        return target - before, shard == mine

    def of_shard(self, columns: jax.Array, is_here: jax.Array | None, width: int) -> jax.Array:
        """i32[rows]: the ids of columns i32[rows] of the shards for which is_here."""
        if self.axis is None:
            return columns
        assert is_here is not None
        ids = columns + lax.axis_index(self.axis) * width
        return lax.psum(jnp.where(is_here, ids, 0), self.axis)

    def _first(self, x: jax.Array) -> jax.Array:
        """i32[]: the id of this shard's first column."""
        assert self.axis is not None
        return lax.axis_index(self.axis) * x.shape[-1]

    def _gathered(self, x: jax.Array) -> jax.Array:
        """[rows, shards] from [rows]."""
        assert self.axis is not None
        return lax.all_gather(x, self.axis, axis=1)

    def _highest(self, x: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        """i32[rows], the lowest id of the highest x by the value that each shard tells of it;
        f32[rows, shards], those.
        """
        assert self.axis is not None
        both = jnp.stack([_bits(value), argmax(x) + self._first(x)])
        values, ids = lax.all_gather(both, self.axis, axis=2)
        shard = jnp.argmax(_real(values), axis=-1)
        return jnp.take_along_axis(ids, shard[:, None], axis=-1)[:, 0], _real(values)


def first_above(sums: jax.Array, target: jax.Array, parts: jax.Array) -> jax.Array:
    """i32[rows]: first index with a part whose running sum exceeds target, else the last index with
    a part.

    Running sums round: two that should be equal may differ, so an empty part is passed over by
    name, and all of them may stay below the target.
    """
    has_part = parts > 0
    above = (sums > target[:, None]) & has_part
    last = sums.shape[-1] - 1 - jnp.argmax(has_part[:, ::-1], axis=-1)
    return jnp.where(above.any(-1), jnp.argmax(above, axis=-1), last).astype(jnp.int32)


def _top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    values, ids = top_k(x, k)
    # A barrier, or XLA sorts all of x for whoever reads a part of these.
    return lax.optimization_barrier((values, ids))


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _real(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)
