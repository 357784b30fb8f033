"""The device state of the rows (running requests): one entry per slot, reset as a whole when a slot
is reused.

The programs advance it (last token, output count, token counts); the host only ever writes whole
rows, so a row cannot carry over anything of the request that had it before.
"""

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from .mesh import MODEL
from .param import Leaf
from .vocab import WORD

MAX_BIASES = 300  # logit_bias pairs a row can hold


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowState:
    """Everything `sample` knows about a row. words = ceil(vocab / 32); bit i of word j is token 32
    j + i. What is kept of each token is divided like the vocabulary of the head.
    """

    last_token: Leaf  # i32[slots]
    num_output: Leaf  # i32[slots], tokens sampled so far
    key: Leaf  # u32[slots, 2], of (request seed, choice)
    temperature: Leaf  # f32[slots], 0 is greedy
    top_p: Leaf  # f32[slots]
    top_k: Leaf  # i32[slots], vocab if off
    min_p: Leaf  # f32[slots]
    presence: Leaf  # f32[slots]
    frequency: Leaf  # f32[slots]
    repetition: Leaf  # f32[slots]
    min_tokens: Leaf  # i32[slots]
    bias_id: Leaf  # i32[slots, MAX_BIASES], vocab where unused
    bias_value: Leaf  # f32[slots, MAX_BIASES]
    allowed: Leaf  # u32[slots, words]
    banned_early: Leaf  # u32[slots, words], tokens banned before min_tokens
    prompt_seen: Leaf  # u32[slots, words]
    counts: Leaf  # i16[slots, vocab], of output tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowTables:
    """The wide part of one row, sent only for requests that use it."""

    allowed: Leaf  # u32[words]
    banned_early: Leaf  # u32[words]
    prompt_seen: Leaf  # u32[words]
    counts: Leaf  # i16[vocab]


_BY_TOKEN = ("allowed", "banned_early", "prompt_seen", "counts")


def row_partition() -> RowState:
    """The partitioning of each array."""
    return RowState(
        **{
            f.name: PartitionSpec(None, MODEL) if f.name in _BY_TOKEN else PartitionSpec()
            for f in fields(RowState)
        }
    )


def table_partition() -> RowTables:
    return RowTables(*(PartitionSpec(MODEL),) * len(fields(RowTables)))


def padded_tables(tables: RowTables, vocab: int) -> RowTables:
    """The tables with the zeros that a padded vocabulary adds. Host side."""
    words = num_words(vocab)
    return RowTables(
        allowed=np.pad(tables.allowed, (0, words - len(tables.allowed))),
        banned_early=np.pad(tables.banned_early, (0, words - len(tables.banned_early))),
        prompt_seen=np.pad(tables.prompt_seen, (0, words - len(tables.prompt_seen))),
        counts=np.pad(tables.counts, (0, vocab - len(tables.counts))),
    )


def num_words(vocab: int) -> int:
    return -(-vocab // WORD)


def abstract_rows(slots: int, vocab: int) -> RowState:
    """The state as jax.ShapeDtypeStructs. vocab: with the padding of all shards."""
    i, f, words = jnp.int32, jnp.float32, num_words(vocab)

    def array(dtype: object, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((slots, *shape), dtype)

    return RowState(
        last_token=array(i), num_output=array(i), key=array(jnp.uint32, 2),
        temperature=array(f), top_p=array(f), top_k=array(i), min_p=array(f),
        presence=array(f), frequency=array(f), repetition=array(f), min_tokens=array(i),
        bias_id=array(i, MAX_BIASES), bias_value=array(f, MAX_BIASES),
        allowed=array(jnp.uint32, words), banned_early=array(jnp.uint32, words),
        prompt_seen=array(jnp.uint32, words), counts=array(jnp.int16, vocab),
    )  # fmt: skip


# One changed row on its way to the device: i32 columns, floats by their bits.
ROW_COLUMNS = (
    "slot", "length", "last_token", "num_output", "seed_high", "seed_low", "choice", "top_k",
    "min_tokens", "temperature", "top_p", "min_p", "presence", "frequency", "repetition",
)  # fmt: skip
NUM_COLUMNS = len(ROW_COLUMNS) + 2 * MAX_BIASES


def update_rows(
    state: RowState,
    lengths: jax.Array,  # i32[slots]
    packed: jax.Array,  # i32[changed, NUM_COLUMNS]; slot = slots where padded
    tables: RowTables | None,  # of the single changed row, else the defaults
) -> tuple[RowState, jax.Array]:
    """Write changed rows in full, and their lengths."""
    column = {name: packed[:, i] for i, name in enumerate(ROW_COLUMNS)}
    slot = column["slot"]
    rows, vocab = packed.shape[0], state.counts.shape[-1]
    words = state.allowed.shape[-1]
    start = len(ROW_COLUMNS)

    def real(bits: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def key(high: jax.Array, low: jax.Array, choice: jax.Array) -> jax.Array:
        seed = jnp.stack([high, low]).astype(jnp.uint32)
        return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(seed), choice))

    zeros = jnp.zeros((rows, words), jnp.uint32)
    new = RowState(
        **{name: column[name] for name in ("last_token", "num_output", "top_k", "min_tokens")},
        **{
            name: real(column[name])
            for name in ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")
        },
        key=jax.vmap(key)(column["seed_high"], column["seed_low"], column["choice"]),
        bias_id=packed[:, start : start + MAX_BIASES],
        bias_value=real(packed[:, start + MAX_BIASES :]),
        allowed=~zeros if tables is None else tables.allowed[None],
        banned_early=zeros if tables is None else tables.banned_early[None],
        prompt_seen=zeros if tables is None else tables.prompt_seen[None],
        counts=jnp.zeros((rows, vocab), jnp.int16) if tables is None else tables.counts[None],
    )
    state = jax.tree.map(lambda old, row: old.at[slot].set(row, mode="drop"), state, new)
    return state, lengths.at[slot].set(column["length"], mode="drop")


def unpack_bits(words: jax.Array, vocab: int) -> jax.Array:
    """bool[rows, vocab] from u32[rows, words]."""
    bits = (words[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32)) & 1
    return bits.reshape(words.shape[0], -1)[:, :vocab].astype(bool)


def pack_bits(token_ids: "np.typing.ArrayLike", vocab: int) -> np.ndarray:
    """u32[words] with the bits of these tokens set. Host side."""
    bits = np.zeros(num_words(vocab) * WORD, np.uint8)
    bits[np.asarray(token_ids, np.int64)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)
