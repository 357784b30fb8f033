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

from ..pallas_kernels.reductions import argmax, sum_last
from .batch import FLAG_FILTERS, FLAG_MASKS, FLAG_PENALTIES
from .param import Leaf
from .rows import RowState, unpack_bits

BLOCK = 128  # sums and maxima over the vocabulary go in two levels of this width
TOP = 64  # filters look at this many of the highest logits before they sort the vocabulary

_MASKED = -jnp.inf
_MAX_COUNT = 2**15 - 1


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


def sample_greedy(
    token: jax.Array,  # i32[rows], of the highest logit
    is_bad: jax.Array,  # i32[rows], 1 if a logit is not finite
    state: RowState,
    slots: jax.Array,  # i32[rows], num_slots where nothing is sampled
) -> tuple[Sampled, RowState]:
    """The variant for batches whose rows are all greedy and ask for nothing else."""
    state = replace(
        state,
        last_token=state.last_token.at[slots].set(token, mode="drop"),
        num_output=state.num_output.at[slots].add(1, mode="drop"),
    )
    return Sampled(jnp.stack([token, is_bad]), token), state


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
    # Nothing is allowed (-inf), or bias and penalties left the range of f32.
    is_bad |= ~jnp.isfinite(adjusted.max(-1))
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
    # Counts stop at the end of i16 instead of turning negative.
    count = state.counts.at[slots, token].get(mode="fill", fill_value=0)
    new_state = replace(
        state,
        last_token=state.last_token.at[slots].set(token, mode="drop"),
        num_output=state.num_output.at[slots].add(1, mode="drop"),
        counts=state.counts.at[slots, token].set(count + (count < _MAX_COUNT), mode="drop"),
    )
    return Sampled(jnp.stack([token, is_bad.astype(jnp.int32)]), token), new_state


def token_logprobs(logits: jax.Array, tokens: jax.Array, k: int) -> TokenLogprobs:
    """logits: f32[rows, vocab], raw; tokens: i32[rows]; k up to the vocabulary."""
    highest = logits.max(-1, keepdims=True)
    norm = highest + jnp.log(sum_last(jnp.exp(logits - highest)))
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


def draw(x: jax.Array, threshold: jax.Array, uniform: jax.Array) -> jax.Array:
    """i32[rows]: inverse-CDF draw from softmax of the logits >= threshold, in order of id.

    x: f32[rows, vocab]; threshold, uniform in [0, 1): f32[rows]. Sums go in two levels of BLOCK.
    """
    highest = x.max(-1, keepdims=True)
    weights = jnp.where(x >= threshold[:, None], jnp.exp(x - highest), 0.0)
    blocks = _blocks(weights, 0.0)
    sums = sum_last(blocks)[..., 0]  # [rows, blocks]
    ends = jnp.cumsum(sums, axis=-1)
    target = uniform * ends[:, -1]
    block = _first_above(ends, target, sums)
    before = jnp.where(
        block > 0, jnp.take_along_axis(ends, jnp.maximum(block - 1, 0)[:, None], 1)[:, 0], 0.0
    )
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [rows, BLOCK]
    token = _first_above(jnp.cumsum(inside, axis=-1), target - before, inside)
    return (block * BLOCK + token).astype(jnp.int32)


def filter_threshold(
    x: jax.Array,  # f32[rows, vocab], after temperature
    top_k: jax.Array,  # i32[rows], vocab if off
    top_p: jax.Array,  # f32[rows], 1 if off
    min_p: jax.Array,  # f32[rows], 0 if off
) -> jax.Array:  # f32[rows]
    """The lowest logit that min-p, top-k and top-p (each over what the former left) keep."""
    vocab = x.shape[-1]
    highest = x.max(-1)
    floor = highest + jnp.log(min_p)  # -inf if off
    near = lax.top_k(x, min(TOP, vocab))[0]
    by_near, mass_short = _threshold(near, x, top_k, top_p, floor)
    # Is the k-th highest logit among these, or below the floor anyway? Is all the mass that top-p
    # wants?
    is_cut_known = (top_k <= TOP) | (top_k >= vocab) | (near[:, -1] < floor)
    is_inside = is_cut_known & ~mass_short
    by_sort = lax.cond(
        is_inside.all(),
        lambda: by_near,
        lambda: _threshold(jnp.sort(x, descending=True), x, top_k, top_p, floor)[0],
    )
    return jnp.where(is_inside, by_near, by_sort)


def _threshold(
    ordered: jax.Array,  # f32[rows, n], the n highest of x, descending
    x: jax.Array,  # f32[rows, vocab]
    top_k: jax.Array,
    top_p: jax.Array,
    floor: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # f32[rows], bool[rows]
    """The threshold, if the k-th highest is in `ordered`; and whether top-p wants more than is."""
    kth = jnp.take_along_axis(ordered, jnp.clip(top_k - 1, 0, ordered.shape[-1] - 1)[:, None], 1)
    # What min-p and top-k leave: with every tie of the last one, also those past `ordered`.
    cut = jnp.maximum(floor, jnp.where(top_k < x.shape[-1], kth[:, 0], _MASKED))[:, None]
    highest = ordered[:, :1]
    wanted = top_p * sum_last(jnp.where(x >= cut, jnp.exp(x - highest), 0.0))[:, 0]
    weights = jnp.where(ordered >= cut, jnp.exp(ordered - highest), 0.0)
    ends = jnp.cumsum(weights, axis=-1)
    # The first token is always kept; another one while what came before it is short of top_p.
    is_kept = (ends - weights < wanted[:, None]) | (jnp.arange(ordered.shape[-1]) == 0)
    lowest = jnp.maximum(jnp.where(is_kept, ordered, jnp.inf).min(-1, keepdims=True), cut)[:, 0]
    # At 1 the rounding of the sums must not cut the tail.
    is_off = top_p >= 1
    return jnp.where(is_off, cut[:, 0], lowest), ~is_off & (ends[:, -1] < wanted)


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


def _first_above(sums: jax.Array, target: jax.Array, parts: jax.Array) -> jax.Array:
    """i32[rows]: first index with a part whose running sum exceeds target, else the last index with
    a part.

    Running sums round: two that should be equal may differ, so an empty part is passed over by
    name, and all of them may stay below the target.
    """
    has_part = parts > 0
    above = (sums > target[:, None]) & has_part
    last = sums.shape[-1] - 1 - jnp.argmax(has_part[:, ::-1], axis=-1)
    return jnp.where(above.any(-1), jnp.argmax(above, axis=-1), last).astype(jnp.int32)
