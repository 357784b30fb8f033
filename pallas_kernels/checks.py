"""The contract of each op: the types of its arguments and the shape and dtype rules, checked at
trace time.

The registry's dispatch runs these once for every implementation, so the shape comments elsewhere
cannot rot. Axis words: tokens, rows, heads, kv_heads, head_dim, value_dim, pages, page_size, width
(pages a row may hold), items.
"""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

# Most queries of one work item, where the implementation does not ask for another number.
QUERIES_PER_ITEM = 16


class KVPages(NamedTuple):
    """One layer's cache. `v` is None for a latent cache: its values are the first columns of k.

    How a page's numbers lie inside it is the business of who reads it: see attention_cpu.py.
    """

    k: Any  # array [pages, kv_heads, page_size, head_dim]
    v: Any  # the same [pages, kv_heads, page_size, value_dim]


class LayerPages(NamedTuple):
    """One layer's cache inside the arrays of all layers, which have an axis for them in front: a
    program that is given two arrays is called in half the time of one that is given sixty.
    """

    k: Any  # array [layers, pages, kv_heads, page_size, head_dim]
    v: Any  # the same, value_dim wide
    layer: Any  # i32[]


Pages = TypeVar("Pages", KVPages, LayerPages)  # what goes in comes out


@dataclass(frozen=True)
class AttentionSpec:
    """What is known before tracing. Hashable: it is a static argument of a layer."""

    scale: float
    soft_cap: float | None = None  # scores become cap * tanh(scores / cap)
    value_dim: int | None = None  # needed for a latent cache, where v is None
    norm_epsilon: float = 0.0  # of the norms of each head, if there are any
    # What reads the output of Ops.attend rounds it to this: it may come in it. None: q's dtype.
    read_as: Any = None


@dataclass(frozen=True)
class AttentionShape:
    """What is known at start of the attention of a model, on one device: it decides who serves it.

    value_dim None: a latent cache.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int | None
    page_size: int
    kv_dtype: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionBatch:
    """Which keys each query of a ragged step may see, and where new keys are written.

    Tokens of one-query rows come first: token t < num_single is the only query of row t. The rest
    is cut into work items of consecutive tokens of one row, listed in the order of their tokens;
    at most Ops.queries_per_item of them each.
    """

    attend_from: jax.Array  # i32[tokens], first visible position; a padded token has from = to = 0
    attend_to: jax.Array  # i32[tokens], one past the last visible position
    token_row: jax.Array  # i32[tokens], row of the page table
    write_page: (
        jax.Array
    )  # i32[tokens], page that receives the token's k and v; pages (dropped) if padded
    write_offset: jax.Array  # i32[tokens], slot inside that page
    page_table: (
        jax.Array
    )  # i32[rows, width]; past the end, and before what a row's queries see, any
    num_tokens: jax.Array  # i32[], the rest is padding
    num_single: jax.Array  # i32[]
    num_items: jax.Array  # i32[]
    item_row: jax.Array  # i32[items]
    item_first: jax.Array  # i32[items], first token
    item_count: jax.Array  # i32[items], tokens


class PlannedBatch(NamedTuple):
    """A batch and what the chosen implementation made of it, once for all layers of a group."""

    batch: AttentionBatch
    plan: Any  # a pytree of the implementation's own; None if it needs none


@dataclass(frozen=True)
class LinearSpec:
    """What a product makes of its sums. Hashable: it is a static argument of a layer.

    is_gated: the first half of the rows of W are gates, the rest ups; the result is silu(gate) * up
    in W's dtype. is_exact: x comes as two arrays in W's dtype, its rounded values and what rounding
    left.
    """

    is_gated: bool = False
    is_exact: bool = False


# The axis of each array of the batch; page_table has its own rule.
_AXIS_BY_FIELD = {
    "attend_from": "tokens", "attend_to": "tokens", "token_row": "tokens",
    "write_page": "tokens", "write_offset": "tokens", "page_table": None,
    "num_tokens": "", "num_single": "", "num_items": "",
    "item_row": "items", "item_first": "items", "item_count": "items",
}  # fmt: skip


class ContractError(TypeError):
    """An op was called with arrays that break its contract; always a bug of the caller's code."""


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise ContractError(rule)


def _check_pages(kv: KVPages | LayerPages) -> None:
    axes = ["pages", "kv_heads", "page_size", "head_dim"]
    if isinstance(kv, LayerPages):
        axes.insert(0, "layers")
        shape, dtype = kv.layer.shape, kv.layer.dtype
        is_sound = shape == () and dtype == jnp.int32
        _require(is_sound, f"layer must be i32[], got {dtype}{list(shape)}")
    _require(kv.k.ndim == len(axes), f"k pages must be [{', '.join(axes)}], got {kv.k.shape}")


def check_attend(
    qkv: jax.Array,  # [tokens, (heads + 2 * kv_heads) * head_dim]
    kv: KVPages | LayerPages,
    batch: AttentionBatch,
    spec: AttentionSpec,
) -> None:
    """check_paged_attention of the heads that are one array."""
    _require(qkv.ndim == 2, f"qkv must be [tokens, columns], got {qkv.shape}")
    _check_pages(kv)
    tokens, columns = qkv.shape
    kv_heads, _, head_dim = kv.k.shape[-3:]
    heads = columns // head_dim - 2 * kv_heads
    _require(
        columns % head_dim == 0 and heads > 0,
        f"qkv must be [tokens, (heads + 2 * {kv_heads}) * {head_dim}], got {qkv.shape}",
    )
    q, new = (  # their shapes are all that is read
        jax.ShapeDtypeStruct((tokens, count, head_dim), qkv.dtype) for count in (heads, kv_heads)
    )
    check_paged_attention(q, new, new, kv, batch, spec, None)


def check_paged_attention(
    q: jax.Array | jax.ShapeDtypeStruct,  # [tokens, heads, head_dim]
    k_new: jax.Array | jax.ShapeDtypeStruct,  # [tokens, kv_heads, head_dim]
    v_new: jax.Array | jax.ShapeDtypeStruct | None,  # [tokens, kv_heads, value_dim]
    kv: KVPages | LayerPages,
    batch: AttentionBatch,
    spec: AttentionSpec,
    sinks: jax.Array | None,  # f32[heads]
) -> None:
    """Raise ContractError, naming the rule and both shapes, unless the arguments fit together."""
    _require(q.ndim == 3, f"q must be [tokens, heads, head_dim], got {q.shape}")
    _check_pages(kv)
    tokens, heads, head_dim = q.shape
    num_pages, kv_heads, page_size, cache_dim = kv.k.shape[-4:]
    _require(heads % kv_heads == 0, f"heads must be a multiple of kv_heads: {heads}, {kv_heads}")
    _require(cache_dim == head_dim, f"q has head_dim {head_dim}, the cache has {cache_dim}")
    _require(
        k_new.shape == (tokens, kv_heads, head_dim),
        f"k_new must be [tokens, kv_heads, head_dim] = {(tokens, kv_heads, head_dim)}, got "
        f"{k_new.shape}",
    )
    _require((v_new is None) == (kv.v is None), "v_new and the cache's v must both be there or not")
    if kv.v is None:
        _require(
            spec.value_dim is not None and 0 < spec.value_dim <= head_dim,
            f"a latent cache needs 0 < value_dim <= {head_dim}, got {spec.value_dim}",
        )
    elif v_new is not None:
        want = (tokens, kv_heads, kv.v.shape[-1])
        _require(
            v_new.shape == want,
            f"v_new must be [tokens, kv_heads, value_dim] = {want}, got {v_new.shape}",
        )
        _require(
            kv.v.shape[:-1] == kv.k.shape[:-1] and kv.v.dtype == kv.k.dtype,
            f"k and v pages differ: {kv.k.dtype}{kv.k.shape}, {kv.v.dtype}{kv.v.shape}",
        )
    if sinks is not None:
        _require(sinks.shape == (heads,), f"sinks must be [heads] = ({heads},), got {sinks.shape}")
    _require(
        batch.page_table.ndim == 2,
        f"page_table must be [rows, width], got {batch.page_table.shape}",
    )
    items = batch.item_row.shape[:1]
    for array_field in fields(batch):
        name = array_field.name
        array, axis = getattr(batch, name), _AXIS_BY_FIELD[name]
        if axis is not None:
            shape = {"tokens": (tokens,), "items": items, "": ()}[axis]
            _require(array.shape == shape, f"{name} must be i32{list(shape)}, got {array.shape}")
        _require(array.dtype == jnp.int32, f"{name} must be i32, got {array.dtype}")
    _require(page_size > 0 and num_pages > 1, "the cache needs the null page and one more")


def check_linear(
    x: jax.Array,  # [tokens, in]; exact: [2 * tokens, in]
    w: jax.Array,  # [out, in]
    bias: jax.Array | None,  # [out]
    residual: jax.Array | None,  # f32[tokens, out]
    spec: LinearSpec,
) -> None:
    """Raise ContractError, naming the rule and the shapes, unless the arguments fit together."""
    _require(
        x.ndim == w.ndim == 2 and x.shape[1] == w.shape[1] and x.dtype == w.dtype,
        f"x [tokens, in] and w [out, in] must fit, got {x.dtype}{x.shape}, {w.dtype}{w.shape}",
    )
    outputs = w.shape[0]
    tokens, rest = divmod(x.shape[0], 2 if spec.is_exact else 1)
    _require(not rest, f"x must be [2 * tokens, in] where it is exact, got {x.shape}")
    _require(
        not (spec.is_gated and (spec.is_exact or residual is not None or outputs % 2)),
        f"a gated product has an even number of outputs, and neither a residual nor two parts of x,"
        f" got {outputs} outputs and {spec}",
    )
    if bias is not None:
        _require(bias.shape == (outputs,), f"bias must be [{outputs}], got {bias.shape}")
    if residual is not None:
        _require(
            residual.shape == (tokens, outputs) and residual.dtype == jnp.float32,
            f"residual must be f32[{tokens}, {outputs}], got {residual.dtype}{residual.shape}",
        )
