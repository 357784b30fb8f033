"""From hidden states to tokens: one compiled function for a mixed batch, parameters as arrays.

Order: masks and logit bias, penalties, temperature, min-p, top-k, top-p, draw. A filter keeps every
token whose logit is at least that of the last one it needs, so ties are all kept; the greedy choice
among ties is the lowest id. Logprobs are of the raw logits. Each part is skipped when no row of the
batch needs it.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .batch import FLAG_FILTERS, FLAG_MASKS, FLAG_PENALTIES
from .param import Leaf
from .rows import RowState, unpack_bits

BLOCK = 128  # sums and maxima over the vocabulary go in two levels of this width
TOP = 64  # filters look at this many of the highest logits before they sort the vocabulary

_MASKED = -jnp.inf


class Sampled(NamedTuple):
    """What one `sample` program returns beside the new state."""

    token_and_flag: (
        jax.Array
    )  # i32[2, rows], for the host: the token; 1 if the logits were not finite
    token: jax.Array  # i32[rows], for the device


class TokenLogprobs(NamedTuple):
    """Log-softmax of raw logits: of the chosen token, its rank, and the k most likely tokens."""

    chosen: Leaf  # f32[rows]
    rank: Leaf  # i32[rows], 1 is the most likely
    top_ids: Leaf  # i32[rows, k]
    top: Leaf  # f32[rows, k]


def sample_greedy(logits: jax.Array, state: RowState, slots: jax.Array) -> tuple[Sampled, RowState]:
    """The variant for batches whose rows are all greedy and ask for nothing else.

    logits: f32[rows, vocab]; slots: i32[rows], num_slots where nothing is sampled.
    """
    token = argmax(logits)
    is_bad = ~jnp.isfinite(logits).all(-1)
    state = replace(
        state,
        last_token=state.last_token.at[slots].set(token, mode="drop"),
        num_output=state.num_output.at[slots].add(1, mode="drop"),
    )
    return Sampled(jnp.stack([token, is_bad.astype(jnp.int32)]), token), state


def sample(
    logits: jax.Array,  # f32[rows, vocab]
    state: RowState,
    slots: jax.Array,  # i32[rows], num_slots where nothing is sampled
    flags: jax.Array,  # i32[NUM_FLAGS]
    step_mask: jax.Array,  # u32[rows, words], tokens allowed in this step
) -> tuple[Sampled, RowState]:
    """Draw one token per row."""
    at = jnp.minimum(
        slots, state.last_token.shape[0] - 1
    )  # padded rows compute on some row, and are dropped
    is_bad = ~jnp.isfinite(logits).all(-1)
    adjusted = lax.cond(
        flags[FLAG_MASKS] > 0,
        lambda x: _mask_and_bias(x, state, at, step_mask),
        lambda x: x,
        logits,
    )
    adjusted = lax.cond(
        flags[FLAG_PENALTIES] > 0, lambda x: _penalize(x, state, at), lambda x: x, adjusted
    )
    is_bad |= adjusted.max(-1) == _MASKED
    temperature = state.temperature[at]
    is_greedy = temperature == 0
    # From the highest down: a tiny temperature sends the others to -inf and nothing to NaN.
    scaled = adjusted - adjusted.max(-1, keepdims=True)
    scaled = scaled / jnp.where(is_greedy, 1.0, temperature)[:, None]
    threshold = lax.cond(
        flags[FLAG_FILTERS] > 0,
        lambda x: filter_threshold(x, state.top_k[at], state.top_p[at], state.min_p[at]),
        lambda x: jnp.full(x.shape[:1], _MASKED, x.dtype),
        scaled,
    )
    uniform = _uniform(state.key[at], state.num_output[at])
    drawn = lax.cond(
        is_greedy.all(),
        lambda x: jnp.zeros(x.shape[:1], jnp.int32),
        lambda x: draw(x, threshold, uniform),
        scaled,
    )
    token = jnp.where(is_greedy, argmax(adjusted), drawn)
    new_state = replace(
        state,
        last_token=state.last_token.at[slots].set(token, mode="drop"),
        num_output=state.num_output.at[slots].add(1, mode="drop"),
        counts=state.counts.at[slots, token].add(1, mode="drop"),
    )
    return Sampled(jnp.stack([token, is_bad.astype(jnp.int32)]), token), new_state


def token_logprobs(logits: jax.Array, tokens: jax.Array, k: int) -> TokenLogprobs:
    """logits: f32[rows, vocab], raw; tokens: i32[rows]; k up to the vocabulary."""
    highest = logits.max(-1, keepdims=True)
    norm = highest + jnp.log(jnp.exp(logits - highest).sum(-1, keepdims=True))
    value = jnp.take_along_axis(logits, tokens[:, None], axis=-1, mode="clip")
    rank = 1 + (logits > value).sum(-1, dtype=jnp.int32)
    if k == 0:
        rows = logits.shape[0]
        ids, top = jnp.zeros((rows, 0), jnp.int32), jnp.zeros((rows, 0), jnp.float32)
    elif k >= logits.shape[-1]:
        # All of them: in order of id, the host ranks them.
        ids = jnp.broadcast_to(jnp.arange(logits.shape[-1], dtype=jnp.int32), logits.shape)
        top = logits - norm
    else:
        top, ids = lax.top_k(logits, k)
        top = top - norm
    return TokenLogprobs((value - norm)[:, 0], rank, ids, top)


def argmax(x: jax.Array) -> jax.Array:
    """i32[rows]: the lowest index of the highest value, in two levels (plain argmax is far slower
    on CPU).
    """
    blocks = _blocks(x, _MASKED)
    best = jnp.argmax(blocks.max(-1), axis=-1)
    inside = jnp.take_along_axis(blocks, best[:, None, None], axis=1)[:, 0]
    return (best * BLOCK + jnp.argmax(inside, axis=-1)).astype(jnp.int32)


def draw(x: jax.Array, threshold: jax.Array, uniform: jax.Array) -> jax.Array:
    """i32[rows]: inverse-CDF draw from softmax of the logits >= threshold, in order of id.

    x: f32[rows, vocab]; threshold, uniform in [0, 1): f32[rows]. Sums go in two levels of BLOCK.
    """
    highest = x.max(-1, keepdims=True)
    weights = jnp.where(x >= threshold[:, None], jnp.exp(x - highest), 0.0)
    blocks = _blocks(weights, 0.0)
    ends = jnp.cumsum(blocks.sum(-1), axis=-1)  # [rows, blocks]
    target = uniform * ends[:, -1]
    # The first block, and in it the first token, whose running sum exceeds the target. Rounding may
    # leave none: then the last one with any weight is meant.
    block = _first_above(ends, target)
    before = jnp.where(
        block > 0, jnp.take_along_axis(ends, jnp.maximum(block - 1, 0)[:, None], 1)[:, 0], 0.0
    )
    inside = jnp.cumsum(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], axis=-1)
    return (block * BLOCK + _first_above(inside, target - before)).astype(jnp.int32)


def filter_threshold(
    x: jax.Array,  # f32[rows, vocab], after temperature
    top_k: jax.Array,  # i32[rows], vocab if off
    top_p: jax.Array,  # f32[rows], 1 if off
    min_p: jax.Array,  # f32[rows], 0 if off
) -> jax.Array:  # f32[rows]
    """The lowest logit that min-p, top-k and top-p (each over what the former left) keep."""
    vocab = x.shape[-1]
    highest = x.max(-1)
    total = jnp.exp(x - highest[:, None]).sum(-1)
    floor = highest + jnp.log(min_p)  # -inf if off
    if vocab <= TOP:
        return _threshold(jnp.sort(x, descending=True), total, top_k, top_p, floor)
    near = lax.top_k(x, TOP)[0]
    all_inside = (top_k <= TOP) | (near[:, -1] < floor)
    is_unfiltered = (top_k >= vocab) & (min_p == 0)
    mass_inside = jnp.exp(near - highest[:, None]).sum(-1) >= top_p * total
    # min-p alone needs no sorting at all.
    only_floor = (top_k >= vocab) & (top_p >= 1)
    is_inside = all_inside | (is_unfiltered & mass_inside) | only_floor
    by_near = jnp.where(only_floor, floor, _threshold(near, total, top_k, top_p, floor))
    by_sort = lax.cond(
        is_inside.all(),
        lambda: by_near,
        lambda: _threshold(jnp.sort(x, descending=True), total, top_k, top_p, floor),
    )
    return jnp.where(is_inside, by_near, by_sort)


def _threshold(
    ordered: jax.Array,  # f32[rows, n], the n highest, descending
    total: jax.Array,  # f32[rows], sum of exp(x - highest) over the vocabulary
    top_k: jax.Array,
    top_p: jax.Array,
    floor: jax.Array,
) -> jax.Array:
    rank = jnp.arange(ordered.shape[-1])
    kth = jnp.take_along_axis(ordered, jnp.clip(top_k - 1, 0, ordered.shape[-1] - 1)[:, None], 1)
    is_left = (ordered >= floor[:, None]) & ((rank < top_k[:, None]) | (ordered >= kth))
    weights = jnp.where(is_left, jnp.exp(ordered - ordered[:, :1]), 0.0)
    is_cut = ~is_left.all(-1)
    mass = jnp.where(is_cut, weights.sum(-1), total)
    before = jnp.cumsum(weights, axis=-1) - weights
    # The first token is always kept; another one while what came before it is short of top_p. At 1
    # the rounding of the sum must not cut the tail.
    is_kept = is_left & ((before < (top_p * mass)[:, None]) | (top_p >= 1)[:, None] | (rank == 0))
    lowest = jnp.where(is_kept, ordered, jnp.inf).min(-1)
    return jnp.where(is_kept.all(-1) & (top_p >= 1) & ~is_cut, _MASKED, lowest)


def _mask_and_bias(x: jax.Array, state: RowState, at: jax.Array, step_mask: jax.Array) -> jax.Array:
    vocab = x.shape[-1]
    allowed = state.allowed[at] & step_mask
    is_early = state.num_output[at] < state.min_tokens[at]
    allowed = allowed & ~jnp.where(is_early[:, None], state.banned_early[at], 0)
    rows = jnp.arange(x.shape[0])[:, None]
    # Unused pairs carry id vocab and are dropped.
    x = x.at[rows, state.bias_id[at]].add(state.bias_value[at], mode="drop")
    return jnp.where(unpack_bits(allowed, vocab), x, _MASKED)


def _penalize(x: jax.Array, state: RowState, at: jax.Array) -> jax.Array:
    """Repetition (Keskar et al. 2019, section 4.1) over prompt and output; presence and frequency
    over output.
    """
    counts = state.counts[at]
    is_out = counts > 0
    seen = is_out | unpack_bits(state.prompt_seen[at], x.shape[-1])
    repetition = state.repetition[at][:, None]
    x = jnp.where(seen, jnp.where(x > 0, x / repetition, x * repetition), x)
    x = x - state.frequency[at][:, None] * counts
    return x - state.presence[at][:, None] * is_out


def _uniform(keys: jax.Array, position: jax.Array) -> jax.Array:
    """One f32 in [0, 1) per row, of (key, output position) alone. keys: u32[rows, 2]."""

    def one(key: jax.Array, n: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), n))

    return jax.vmap(one)(keys, position)


def _blocks(x: jax.Array, fill: float) -> jax.Array:
    """[rows, vocab] -> [rows, blocks, BLOCK]."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[-1] % BLOCK)), constant_values=fill)
    return x.reshape(x.shape[0], -1, BLOCK)


def _first_above(sums: jax.Array, target: jax.Array) -> jax.Array:
    """i32[rows]: first index whose running sum exceeds target, else the last index at which the sum
    grew.
    """
    above = sums > target[:, None]
    grew = jnp.diff(sums, axis=-1, prepend=0.0) > 0
    last = sums.shape[-1] - 1 - jnp.argmax(grew[:, ::-1], axis=-1)
    return jnp.where(above.any(-1), jnp.argmax(above, axis=-1), last).astype(jnp.int32)
