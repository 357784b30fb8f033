"""Sampling from the highest logits of each row alone, as sampling.sample does from all of them.

What no filter keeps has weight 0, and adding 0 changes no sum: so every sum over the vocabulary is
taken of the few that are kept, each at its own place in the order of addition, and the tokens are
the same to the bit.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ..cpu_kernels import ops
from ..pallas_kernels.reductions import FIRST_TERMS, sum_last
from .filters import TOP, filter_threshold
from .rows import RowState
from .sampling import BLOCK, draw_from, kept_weights, uniform_of
from .vocab import Vocabulary

NUM_HIGHEST = TOP + 1  # the last one is there to be left out


@dataclass(frozen=True)
class HighestTokens:
    """Of a Vocabulary, what filter_threshold asks. Arrays x: f32[rows, n], of the tokens `ids`,
    falling; of those that are left out, nothing counts.
    """

    size: int
    ids: jax.Array  # i32[rows, n]

    def top(self, x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        return x[:, :k], self.ids[:, :k]

    def sum(self, x: jax.Array) -> jax.Array:
        """f32[rows], as Vocabulary.sum of x among zeros."""
        num_groups = -(-self.size // FIRST_TERMS)
        group, place = self.ids % num_groups, self.ids // num_groups
        sums = ops.group_sums(x, group, place, num_groups, FIRST_TERMS)
        return sum_last(sums)[:, 0]

    def draw(self, x: jax.Array, threshold: jax.Array, uniform: jax.Array) -> jax.Array:
        """i32[rows], as sampling.draw of x among what is below the threshold."""
        weights = kept_weights(x, threshold, x[:, 0])
        block, place = self.ids // BLOCK, self.ids % BLOCK
        sums = ops.group_sums(weights, block, place, -(-self.size // BLOCK), BLOCK)

        def inside(chosen: jax.Array) -> jax.Array:
            alone = jnp.where(block == chosen[:, None], place, BLOCK)
            return ops.group_sums(weights, alone, jnp.zeros_like(place), BLOCK, 1)

        return draw_from(sums, inside, uniform, Vocabulary(self.size), self.size)


def serves(
    state: RowState,
    at: jax.Array,  # i32[rows], slots
    is_padding: jax.Array,  # bool[rows]
) -> jax.Array:
    """bool[]: whether no row, as it is drawn, needs more than its highest logits."""
    few = (state.temperature[at] == 0) | (state.top_k[at] <= TOP)
    return (few | is_padding).all()


def choose(
    logits: jax.Array,  # f32[rows, NUM_HIGHEST], falling, of equal ones the lowest ids first
    ids: jax.Array,  # i32[rows, NUM_HIGHEST]
    state: RowState,
    at: jax.Array,  # i32[rows], slots
    is_padding: jax.Array,  # bool[rows]
    size: int,
) -> tuple[jax.Array, jax.Array]:
    """i32[rows], the tokens; bool[], whether they are those that all logits give: not where ties
    go on beyond the highest.
    """
    temperature = state.temperature[at]
    is_greedy = temperature == 0
    scaled = (logits - logits[:, :1]) / jnp.where(is_greedy, 1.0, temperature)[:, None]
    is_drawn = ~(is_greedy | is_padding)
    # What greedy rows and padding ask of the filters does not matter, and must not cost anything.
    top_k = jnp.where(is_drawn, state.top_k[at], 1)
    top_p = jnp.where(is_drawn, state.top_p[at], 1.0)
    last = jnp.take_along_axis(scaled, jnp.clip(top_k, 1, TOP)[:, None] - 1, axis=-1)[:, 0]
    is_whole = (last > scaled[:, -1]) | ~is_drawn
    tokens = HighestTokens(size, ids)
    threshold = filter_threshold(scaled, top_k, top_p, state.min_p[at], tokens)
    drawn = tokens.draw(scaled, threshold, uniform_of(state, at))
    return jnp.where(is_greedy, ids[:, 0], drawn), is_whole.all()
