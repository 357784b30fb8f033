"""From hidden states to tokens: one compiled function for a mixed batch, parameters as arrays.

Order: masks and logit bias, penalties, temperature, min-p, top-k, top-p (filters.py), draw. The
greedy choice among ties is the lowest id. Logprobs are of the raw logits. Each part is skipped when
no row of the batch needs it.

Logits and what a row keeps of each token may be split over the vocabulary (vocab.py): `width` is
this device's part of it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..pallas_kernels.reductions import sum_last
from .batch import FLAG_FILTERS, FLAG_MASKS, FLAG_PENALTIES
from .filters import filter_threshold
from .param import Leaf
from .rows import RowState, unpack_bits
from .vocab import Vocabulary, first_above

BLOCK = 128  # sums and maxima over the vocabulary go in two levels of this width

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
    logits: jax.Array,  # f32[rows, width]
    state: RowState,
    slots: jax.Array,  # i32[rows], num_slots where nothing is sampled
    flags: jax.Array,  # i32[NUM_FLAGS]
    step_mask: jax.Array,  # u32[rows, words], tokens allowed in this step
    vocab: Vocabulary,
) -> tuple[Sampled, RowState]:
    """Draw one token per row."""
    at = clipped(slots, state)
    token, is_bad = choose(logits, state, at, flags, step_mask, vocab)
    return record(token, is_bad.astype(jnp.int32), state, slots, vocab)


def clipped(slots: jax.Array, state: RowState) -> jax.Array:
    """i32[rows]: padded rows compute on some row, and are dropped."""
    return jnp.minimum(slots, state.last_token.shape[0] - 1)


def choose(
    logits: jax.Array,  # f32[rows, width]
    state: RowState,
    at: jax.Array,  # i32[rows], slots
    flags: jax.Array,  # i32[NUM_FLAGS]
    step_mask: jax.Array,  # u32[rows, words]
    vocab: Vocabulary,
) -> tuple[jax.Array, jax.Array]:
    """i32[rows], the tokens; bool[rows], whether the logits were not finite."""
    is_bad = vocab.count(~jnp.isfinite(logits)) > 0
    adjusted = lax.cond(
        flags[FLAG_MASKS] > 0,
        lambda x: _mask_and_bias(x, state, at, step_mask, vocab),
        lambda x: x,
        vocab.hide_padding(logits),
    )
    adjusted = lax.cond(
        flags[FLAG_PENALTIES] > 0, lambda x: _penalize(x, state, at), lambda x: x, adjusted
    )
    # Nothing is allowed (-inf), or bias and penalties left the range of f32.
    highest = vocab.max(adjusted)
    is_bad |= ~jnp.isfinite(highest)
    temperature = state.temperature[at]
    is_greedy = temperature == 0
    # From the highest down: a tiny temperature sends the others to -inf and nothing to NaN.
    scaled = adjusted - highest[:, None]
    scaled = scaled / jnp.where(is_greedy, 1.0, temperature)[:, None]
    threshold = lax.cond(
        flags[FLAG_FILTERS] > 0,
        lambda x: filter_threshold(x, state.top_k[at], state.top_p[at], state.min_p[at], vocab),
        lambda x: jnp.full(x.shape[:1], _MASKED, x.dtype),
        scaled,
    )
    uniform = uniform_of(state, at)
    drawn = lax.cond(
        is_greedy.all(),
        lambda x: jnp.zeros(x.shape[:1], jnp.int32),
        lambda x: draw(x, threshold, uniform, vocab),
        scaled,
    )
    return jnp.where(is_greedy, vocab.argmax(adjusted), drawn), is_bad


def record(
    token: jax.Array,  # i32[rows]
    is_bad: jax.Array,  # i32[rows]
    state: RowState,
    slots: jax.Array,  # i32[rows], num_slots where nothing is sampled
    vocab: Vocabulary,
) -> tuple[Sampled, RowState]:
    """The rows' tokens, counted and handed out."""
    column = vocab.local(token, state.counts.shape[-1])
    # Counts stop at the end of i16 instead of turning negative.
    count = state.counts.at[slots, column].get(mode="fill", fill_value=0)
    new_state = replace(
        state,
        last_token=state.last_token.at[slots].set(token, mode="drop"),
        num_output=state.num_output.at[slots].add(1, mode="drop"),
        counts=state.counts.at[slots, column].set(count + (count < _MAX_COUNT), mode="drop"),
    )
    return Sampled(jnp.stack([token, is_bad]), token), new_state


def token_logprobs(
    logits: jax.Array,  # f32[rows, width], raw
    tokens: jax.Array,  # i32[rows]
    k: int,
    vocab: Vocabulary,
) -> TokenLogprobs:
    """k up to the vocabulary, which is then given in order of id: the host ranks it."""
    logits = vocab.hide_padding(logits)
    highest = vocab.max(logits)[:, None]
    norm = highest + jnp.log(vocab.sum(jnp.exp(logits - highest)))[:, None]
    value = vocab.pick(logits, tokens)[:, None]
    rank = 1 + vocab.count(logits > value)
    if k == 0:
        rows = logits.shape[0]
        ids, top = jnp.zeros((rows, 0), jnp.int32), jnp.zeros((rows, 0), jnp.float32)
    elif k >= vocab.size:
        top = vocab.gather(logits) - norm
        ids = jnp.broadcast_to(jnp.arange(vocab.size, dtype=jnp.int32), top.shape)
    else:
        top, ids = vocab.top(logits, k)
        top = top - norm
    return TokenLogprobs((value - norm)[:, 0], rank, ids, top)


def draw(
    x: jax.Array,  # f32[rows, width]
    threshold: jax.Array,  # f32[rows]
    uniform: jax.Array,  # f32[rows], in [0, 1)
    vocab: Vocabulary,
) -> jax.Array:
    """i32[rows]: inverse-CDF draw from softmax of the logits >= threshold, in order of id. Sums go
    in levels: shards, blocks of BLOCK.
    """
    weights = kept_weights(x, threshold, vocab.max(x))
    blocks = _blocks(weights, 0.0)

    def inside(block: jax.Array) -> jax.Array:
        return jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]

    return draw_from(sum_last(blocks)[..., 0], inside, uniform, vocab, x.shape[-1])


def kept_weights(x: jax.Array, threshold: jax.Array, highest: jax.Array) -> jax.Array:
    """f32[rows, width]: of each token, relative to the highest; 0 below the threshold."""
    return jnp.where(x >= threshold[:, None], jnp.exp(x - highest[:, None]), 0.0)


def draw_from(
    sums: jax.Array,  # f32[rows, blocks], of the weights in each
    inside: Callable[[jax.Array], jax.Array],  # f32[rows, BLOCK], the weights of i32[rows] blocks
    uniform: jax.Array,  # f32[rows]
    vocab: Vocabulary,
    width: int,
) -> jax.Array:
    """i32[rows]: draw, once the weights are summed up."""
    ends = jnp.cumsum(sums, axis=-1)
    target, is_here = vocab.locate(ends[:, -1], uniform)
    block = first_above(ends, target, sums)
    before = jnp.where(
        block > 0, jnp.take_along_axis(ends, jnp.maximum(block - 1, 0)[:, None], 1)[:, 0], 0.0
    )
    weights = inside(block)
    token = first_above(jnp.cumsum(weights, axis=-1), target - before, weights)
    return vocab.of_shard((block * BLOCK + token).astype(jnp.int32), is_here, width)


def _mask_and_bias(
    x: jax.Array,  # f32[rows, width]
    state: RowState,
    at: jax.Array,  # i32[rows], slots
    step_mask: jax.Array,
    vocab: Vocabulary,
) -> jax.Array:
    width = x.shape[-1]
    allowed = state.allowed[at] & step_mask
    is_early = state.num_output[at] < state.min_tokens[at]
    allowed = allowed & ~jnp.where(is_early[:, None], state.banned_early[at], 0)
    rows = jnp.arange(x.shape[0])[:, None]
    # Unused pairs carry an id past the vocabulary: they are dropped, or fall on padding.
    columns = vocab.local(state.bias_id[at], width)
    x = x.at[rows, columns].add(state.bias_value[at], mode="drop")
    return jnp.where(unpack_bits(allowed, width), x, _MASKED)


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


def uniform_of(state: RowState, at: jax.Array) -> jax.Array:
    """f32[rows]: what the rows in slots `at` draw their next token with."""
    return _uniform(state.key[at], state.num_output[at])


def _uniform(keys: jax.Array, position: jax.Array) -> jax.Array:
    """One f32 in [0, 1) per row, of (key, output position) alone. keys: u32[rows, 2]."""

    def one(key: jax.Array, n: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), n))

    return jax.vmap(one)(keys, position)


def _blocks(x: jax.Array, fill: float) -> jax.Array:
    """[rows, width] -> [rows, blocks, BLOCK]."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[-1] % BLOCK)), constant_values=fill)
    return x.reshape(x.shape[0], -1, BLOCK)
