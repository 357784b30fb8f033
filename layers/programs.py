"""The programs of a step as pure functions: forward, sample, decode, score, update_rows.

`forward` gives the hidden states to be sampled and `sample` turns them into tokens: two
executables, so that what depends on the previous token (masks) is an argument of the second only,
and its variants multiply the small one. They run inside one shard_map over the mesh: shapes are
those of one device.
"""

from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..pallas_kernels.checks import KVPages, LayerPages
from . import highest, rows, sampling
from .batch import (
    FLAG_MASKS,
    FLAG_PENALTIES,
    FLAG_SCORES,
    TOKEN_ON_DEVICE,
    CacheShape,
    StepBatch,
    StepLayout,
    unpack,
)
from .context import Context
from .kv_pages import KVLayout
from .linear import Matrix
from .models.llama import Decoder
from .packed import PackedWeight
from .vocab import Vocabulary

SCORE_ROWS = 64  # logprobs go through the head in chunks of at most this many rows


class Variant(Enum):
    """The `sample` programs. Each next one does more and costs more."""

    GREEDY = "greedy"  # argmax of the raw logits
    GENERAL = "general"  # all parameters of the rows, and a mask for this step


class Hidden(NamedTuple):
    """What forward leaves on the device for sample and score."""

    rows: jax.Array  # f32[rows, hidden], normed
    slots: jax.Array  # i32[rows], num_slots where nothing is sampled
    flags: jax.Array  # i32[NUM_FLAGS]
    tokens: jax.Array  # f32[max(tokens, SCORE_ROWS), hidden], normed


class Programs:
    """The functions to compile for one model and one cache layout."""

    def __init__(self, model: Decoder, kv_layout: KVLayout, page_size: int, ctx: Context) -> None:
        self.model = model
        self.kv_layout = kv_layout
        self.page_size = page_size
        self.ctx = ctx
        self.vocab = Vocabulary(model.vocab_size, ctx.model_axis)
        # One jitted block for all layers and programs: a program traces one layer, not all.
        self._block = jax.jit(model.block, static_argnums=(5,))
        self._attend = jax.jit(model.attend, static_argnums=(5,))
        self._rest = jax.jit(model.rest, static_argnums=(4,))

    def forward(
        self,
        weights: Any,
        kv: tuple[KVPages, ...],
        lengths: jax.Array,  # i32[slots]
        last_token: jax.Array,  # i32[slots]
        packed: jax.Array,  # i32[layout.size]
        layout: StepLayout,
        is_running: jax.Array | None = None,  # bool[rows]
    ) -> tuple[Hidden, tuple[KVPages, ...], jax.Array]:
        """Run the tokens of a step through all layers; kv and lengths are donated and returned."""
        cache_shape = CacheShape(self.kv_layout.windows, kv[0].k.shape[-4], self.page_size)
        batch = unpack(packed, lengths, last_token, layout, cache_shape, is_running)
        x = self.model.embed(weights, batch.token_ids, self.ctx)
        tables = self.model.tables(batch.positions)
        groups = [self.ctx.ops.plan_attention(b, self.page_size) for b in batch.attention]
        # A barrier, or XLA computes these again in every layer.
        groups, tables = jax.lax.optimization_barrier((groups, tables))
        cache = list(kv)

        def run(part: Callable[..., Any], i: int, x: jax.Array) -> jax.Array:
            """The block of layer i, or a part of it that reads and writes the cache."""
            j = self.kv_layout.array_by_layer[i]
            group, block = groups[self.kv_layout.group_by_layer[i]], weights.blocks[i]
            if self.ctx.ops.stacks_layers:
                made, stack = part(
                    x, block, LayerPages(*cache[0], jnp.int32(j)), group, tables, self.ctx
                )
                cache[0] = KVPages(stack.k, stack.v)
            else:
                made, cache[j] = part(x, block, cache[j], group, tables, self.ctx)
            return made

        last = len(weights.blocks) - 1
        for i in range(last):
            x = run(self._block, i, x)
        if self.ctx.ops.is_padding_free:
            rows_x, x = self._end(weights, x, run(self._attend, last, x), batch)
        else:
            x = self.model.final_norm(weights, run(self._block, last, x))
            rows_x = x[batch.sample_token]
        # Few distinct sizes, so that score needs few programs.
        x = jnp.pad(x, ((0, max(0, SCORE_ROWS - layout.tokens)), (0, 0)))
        hidden = Hidden(rows_x, batch.sample_slot, batch.flags, x)
        return hidden, tuple(cache), batch.lengths

    def _end(
        self,
        weights: Any,
        x: jax.Array,  # f32[tokens, hidden]
        heads: jax.Array,  # f32[tokens, heads * head_dim], of the last layer
        batch: StepBatch,
    ) -> tuple[jax.Array, jax.Array]:
        """The normed hidden states of the rows and of all tokens. After the last attention no token
        needs another: what is not sampled is left out, and zero, unless it is wanted.
        """

        def rest(x: jax.Array, heads: jax.Array, count: jax.Array) -> jax.Array:
            x = self._rest(x, heads, weights.blocks[-1], count, self.ctx)
            return self.model.final_norm(weights, x)

        count = _num_rows(batch.sample_slot, batch.lengths.shape[0])
        rows_x = rest(x[batch.sample_token], heads[batch.sample_token], count)
        is_row = jnp.arange(rows_x.shape[0]) < count
        return jnp.where(is_row[:, None], rows_x, 0), jax.lax.cond(
            batch.flags[FLAG_SCORES] != 0,
            lambda: rest(x, heads, batch.attention[0].num_tokens),
            lambda: jnp.zeros_like(x),
        )

    def sample(
        self,
        head: Matrix,
        state: rows.RowState,
        hidden_rows: jax.Array,  # f32[rows, hidden]
        slots: jax.Array,  # i32[rows]
        flags: jax.Array,  # i32[NUM_FLAGS]
        step_mask: jax.Array,  # u32[rows, words]
        variant: Variant,
    ) -> tuple[sampling.Sampled, rows.RowState]:
        """One token per row, from the model's head; state is donated and returned."""
        count = _num_rows(slots, state.last_token.shape[0])
        if variant is Variant.GREEDY and self.vocab.axis is None:
            return sampling.sample_greedy(*head.highest(hidden_rows, count), state, slots)
        if variant is Variant.GREEDY:
            logits = head.product(hidden_rows, None)
            return sampling.sample_greedy(*self.vocab.highest(logits), state, slots)
        at = sampling.clipped(slots, state)

        def from_all() -> tuple[jax.Array, jax.Array]:
            logits = head.product(hidden_rows, None)
            return sampling.choose(logits, state, at, flags, step_mask, self.vocab)

        if isinstance(head, PackedWeight) and self.vocab.size > highest.NUM_HIGHEST:
            token, is_bad = self._from_highest(
                head, hidden_rows, count, state, slots, flags, from_all
            )
        else:
            token, is_bad = from_all()
        return sampling.record(token, is_bad.astype(jnp.int32), state, slots, self.vocab)

    def _from_highest(
        self,
        head: PackedWeight,
        hidden_rows: jax.Array,  # f32[rows, hidden]
        count: jax.Array,  # i32[]
        state: rows.RowState,
        slots: jax.Array,  # i32[rows]
        flags: jax.Array,  # i32[NUM_FLAGS]
        from_all: Callable[[], tuple[jax.Array, jax.Array]],
    ) -> tuple[jax.Array, jax.Array]:
        """What from_all gives, i32[rows] and bool[rows], without all logits where that can be."""
        at, is_padding = sampling.clipped(slots, state), slots >= state.last_token.shape[0]

        def try_few() -> tuple[jax.Array, jax.Array]:
            logits, ids, is_bad = head.top(hidden_rows, highest.NUM_HIGHEST, count)
            token, is_same = highest.choose(logits, ids, state, at, is_padding, self.vocab.size)
            return token, is_same & (is_bad == 0).all()

        is_few = highest.serves(state, at, is_padding)
        is_few &= (flags[FLAG_MASKS] == 0) & (flags[FLAG_PENALTIES] == 0)
        nothing = jnp.zeros(slots.shape, jnp.int32), jnp.zeros((), bool)
        token, is_done = jax.lax.cond(is_few, try_few, lambda: nothing)
        finite = jnp.zeros(slots.shape, bool)
        return jax.lax.cond(is_done, lambda: (token, finite), from_all)

    def decode(
        self,
        weights: Any,
        kv: tuple[KVPages, ...],
        lengths: jax.Array,  # i32[slots]
        state: rows.RowState,
        packed: jax.Array,  # i32[layout.size]
        open_mask: jax.Array,  # u32[rows, words], all tokens allowed
        layout: StepLayout,
        variant: Variant,
    ) -> tuple[jax.Array, tuple[KVPages, ...], jax.Array, rows.RowState]:
        """Up to layout.num_steps steps of one token a row, each fed what the one before sampled.

        A row ends after its row_steps, at one of its stop_ids, or at logits that are not finite;
        what it gives from there on means nothing. kv, lengths and state are donated and returned
        behind i32[num_steps, 2, rows], the token_and_flag of each step.
        """
        row_steps, stop_ids = layout.part(packed, "row_steps"), layout.part(packed, "stop_ids")
        first_id, (num_ids,) = layout.parts["token_ids"]
        head = self.model.head(weights)
        on_device = packed.at[first_id : first_id + num_ids].set(TOKEN_ON_DEVICE)

        def is_under_way(carry: Any) -> jax.Array:
            step, is_running = carry[0], carry[1]
            return (step < layout.num_steps) & is_running.any()

        def take_step(carry: Any) -> Any:
            step, is_running, made, kv, lengths, state = carry
            ids = jnp.where(step == 0, packed, on_device)
            hidden, kv, lengths = self.forward(
                weights, kv, lengths, state.last_token, ids, layout, is_running
            )
            sampled, state = self.sample(
                head, state, hidden.rows, hidden.slots, hidden.flags, open_mask, variant
            )
            token, flag = sampled.token_and_flag
            has_ended = (token[:, None] == stop_ids).any(1) | (flag != 0)
            made = made.at[step].set(sampled.token_and_flag)
            step += 1
            return step, is_running & ~has_ended & (step < row_steps), made, kv, lengths, state

        made = jnp.zeros((layout.num_steps, 2, layout.rows), jnp.int32)
        carry = (jnp.int32(0), row_steps > 0, made, kv, lengths, state)
        carry = jax.lax.while_loop(is_under_way, take_step, carry)
        return carry[2:]

    def score(
        self,
        head: Matrix,
        hidden: jax.Array,  # f32[positions, hidden], normed
        first: jax.Array,  # i32[]
        targets: jax.Array,  # i32[targets]
        num_logprobs: int,
    ) -> sampling.TokenLogprobs:
        """Logprobs of given next tokens at the positions from `first`; past the end they mean
        nothing.
        """
        # lax shifts a slice past the end back to the front: clip its rows one by one instead.
        at = jnp.minimum(first + jnp.arange(targets.shape[0]), hidden.shape[0] - 1)
        logits = head.product(hidden[at], None)
        return sampling.token_logprobs(logits, targets, num_logprobs, self.vocab)


def _num_rows(slots: jax.Array, num_slots: int) -> jax.Array:
    """i32[]: of i32[rows], how many there are up to the last that is sampled."""
    at = jnp.arange(1, slots.shape[0] + 1, dtype=jnp.int32)
    return jnp.where(slots < num_slots, at, 0).max()
