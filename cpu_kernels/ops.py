"""The library's ops on jax arrays. Shapes are checked by who calls; dtypes are those of load().

A packed weight is [panels, bytes of a panel / itemsize]: see csrc/linear.h.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

PANEL, DEPTH = 32, 32  # outputs of a panel; inputs are padded to a multiple of the other
GATED_PANEL = 16  # outputs of a panel that holds gates and ups


@dataclass(frozen=True)
class Shape:
    """A matrix [rows, columns] as it is in the checkpoint; gated: its first half are gates."""

    rows: int
    columns: int
    is_gated: bool = False

    @property
    def packed(self) -> tuple[int, int]:
        half = _round_up(self.rows // 2, GATED_PANEL) * 2
        rows = half if self.is_gated else _round_up(self.rows, PANEL)
        return rows // PANEL, PANEL * _round_up(self.columns, DEPTH)


def linear(
    x: jax.Array,  # f32[tokens, in]
    weight: jax.Array,  # packed, [out, in]
    out: int,
    *,
    norm: jax.Array | None = None,  # [in]; vectors are in the weight's dtype
    epsilon: float = 0.0,
    bias: jax.Array | None = None,  # [out]
    residual: jax.Array | None = None,  # f32[tokens, out]
    is_exact: bool = False,
    count: jax.Array | None = None,  # i32[]
) -> jax.Array:
    """f32[tokens, out]: residual + rms_norm(x) W^T + bias.

    is_exact: rms_norm(x) is kept to twice the bits of bfloat16. count: rows from there on are
    padding, and may hold anything.
    """
    tokens, width = x.shape
    results = (jax.ShapeDtypeStruct((tokens, out), jnp.float32), _workspace(tokens, width))
    made: Any = jax.ffi.ffi_call("quire_linear", results)(
        _count(count, tokens),
        x,
        weight,
        _or_empty(norm, weight.dtype),
        _or_empty(bias, weight.dtype),
        _or_empty(residual, jnp.float32),
        epsilon=epsilon,
        is_exact=is_exact,
    )
    return made[0]


def mlp(
    x: jax.Array,  # f32[tokens, hidden]
    norm: jax.Array,  # [hidden]; vectors are in the weights' dtype
    epsilon: float,
    gate_up: jax.Array,  # packed and gated, [2 * inner, hidden]
    gate_up_bias: jax.Array | None,  # [2 * inner]
    down: jax.Array,  # packed, [hidden, inner]
    down_bias: jax.Array | None,  # [hidden]
    inner: int,
    count: jax.Array | None = None,
) -> jax.Array:
    """f32[tokens, hidden]: x + (silu(gate) * up) D^T + bias of rms_norm(x); count: as in linear."""
    tokens, hidden = x.shape
    results = (jax.ShapeDtypeStruct(x.shape, jnp.float32), _workspace(tokens, hidden, inner))
    made: Any = jax.ffi.ffi_call("quire_mlp", results)(
        _count(count, tokens),
        x,
        norm,
        gate_up,
        _or_empty(gate_up_bias, norm.dtype),
        down,
        _or_empty(down_bias, norm.dtype),
        epsilon=epsilon,
        inner=inner,
    )
    return made[0]


def zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """An array of zeros in huge pages, where the system has them."""
    made: jax.Array = jax.ffi.ffi_call("quire_zeros", jax.ShapeDtypeStruct(shape, dtype))()
    return made


def head_argmax(
    x: jax.Array,  # f32[rows, in]
    weight: jax.Array,
    vocab: int,
    count: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """i32[rows] lowest id of the highest logit, and i32[rows] 1 where a logit is not finite; both 0
    from row `count` on. No logits are written.
    """
    rows, width = x.shape
    ids = jax.ShapeDtypeStruct((rows,), jnp.int32)
    call = jax.ffi.ffi_call("quire_head_argmax", (ids, ids, _workspace(rows, width)))
    token, is_bad, _ = call(_count(count, rows), x, weight, vocab=vocab)
    return token, is_bad


def head_top_k(
    x: jax.Array,  # f32[rows, in]
    weight: jax.Array,
    vocab: int,
    k: int,
    count: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """f32[rows, k] and i32[rows, k]: the k highest logits, falling, of equal ones the lowest ids
    first, and their ids; i32[rows] 1 where a logit is not finite, and the others mean nothing.

    k: up to the vocabulary. From row `count` on the logits are 0, of the first ids. No logits are
    written.
    """
    rows, width = x.shape
    results = (
        jax.ShapeDtypeStruct((rows, k), jnp.float32),
        jax.ShapeDtypeStruct((rows, k), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        _workspace(rows, width),
    )
    call = jax.ffi.ffi_call("quire_head_top_k", results)
    made: Any = call(_count(count, rows), x, weight, vocab=vocab)
    return made[0], made[1], made[2]


def group_sums(
    x: jax.Array,  # f32[rows, n]
    group: jax.Array,  # i32[rows, n]; past the last group: left out
    place: jax.Array,  # i32[rows, n], in the group; no two are the same
    num_groups: int,
    size: int,
) -> jax.Array:
    """f32[rows, num_groups]: sum_last of groups of `size` places, 0 where no x is; to the bit, as
    long as `size` is a power of two.
    """
    assert size & (size - 1) == 0, size
    result = jax.ShapeDtypeStruct((x.shape[0], num_groups), jnp.float32)
    made: jax.Array = jax.ffi.ffi_call("quire_group_sums", result)(x, group, place, size=size)
    return made


def embed(ids: jax.Array, table: jax.Array, vocab: int, hidden: int) -> jax.Array:
    """f32[tokens, hidden]: rows of a packed table; ids outside the vocabulary give zeros."""
    result = jax.ShapeDtypeStruct((ids.shape[0], hidden), jnp.float32)
    made: jax.Array = jax.ffi.ffi_call("quire_embed", result)(ids, table, vocab=vocab)
    return made


def attention(
    qkv: jax.Array,  # f32[tokens, (heads + kv_heads) * head_dim + kv_heads * value_dim]
    k: jax.Array,  # [layers, pages, kv_heads, page_size, head_dim]
    v: jax.Array | None,  # the same, value_dim wide; None: the first columns of k
    layer: jax.Array,  # i32[], whose pages these are
    batch: tuple[jax.Array, ...],  # the arrays of an AttentionBatch, in its order
    *,
    heads: int,
    value_dim: int,
    scale: float,
    soft_cap: float | None,
    sinks: jax.Array | None,  # f32[heads]
    tables: tuple[jax.Array, jax.Array] | None,  # f32[tokens, head_dim] each; None: no rotation
    norms: tuple[jax.Array, jax.Array] | None,  # of q and k, [head_dim] each
    epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """f32[tokens, heads * value_dim], and the cache, written in place."""
    empty = _or_empty(None, jnp.float32)
    pages = (k, _or_empty(v, k.dtype))
    made: Any = jax.ffi.ffi_call(
        "quire_attention",
        (
            jax.ShapeDtypeStruct((qkv.shape[0], heads * value_dim), jnp.float32),
            *(jax.ShapeDtypeStruct(p.shape, p.dtype) for p in pages),
        ),
        input_output_aliases={1: 1, 2: 2},
    )(
        qkv,
        *pages,
        layer,
        *((empty, empty) if tables is None else tables),
        *((empty, empty) if norms is None else norms),
        _or_empty(sinks, jnp.float32),
        *batch,
        heads=heads,
        value_dim=value_dim,
        epsilon=epsilon,
        scale=scale,
        soft_cap=soft_cap or 0.0,
    )
    return made[0], made[1], None if v is None else made[2]


def _count(count: jax.Array | None, tokens: int) -> jax.Array:
    return jnp.asarray(tokens, jnp.int32) if count is None else count


def _or_empty(array: jax.Array | None, dtype: Any) -> jax.Array:
    """An argument that is absent has no elements."""
    return jnp.zeros((0,), dtype) if array is None else array


def _workspace(tokens: int, *widths: int) -> jax.ShapeDtypeStruct:
    """Room for prepared rows: workspace_bytes of csrc/kernels.h for each width."""
    columns = sum(_round_up(width, DEPTH) for width in widths)
    return jax.ShapeDtypeStruct((_round_up(tokens, 16) * columns * 4,), jnp.uint8)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
