"""Inputs of paged_attention for the tests of its implementations, and what they must give.

Everything that no request owns holds NaN: KV slots past a row's length, the null page, and the
inputs of padded tokens. A NaN in a result is a byte that must not have been read.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from quire.pallas_kernels.checks import QUERIES_PER_ITEM, AttentionBatch, AttentionSpec, KVPages


@dataclass(frozen=True)
class Case:
    """The static shapes of one compiled program; hypothesis draws the data inside them."""

    tokens: int
    rows: int
    width: int
    page_size: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    items: int
    dtype: str = "float32"  # of q and the new keys
    kv_dtype: str = "float32"
    soft_cap: float | None = None
    has_sinks: bool = False
    is_latent: bool = False
    queries_per_item: int = QUERIES_PER_ITEM

    @property
    def num_pages(self) -> int:
        return self.rows * self.width + 2

    @property
    def spec(self) -> AttentionSpec:
        value_dim = self.value_dim if self.is_latent else None
        return AttentionSpec(self.head_dim**-0.5, self.soft_cap, value_dim)


# Rounding of the output; the arithmetic is f32 in jnp.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-9}

SEEDS = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Row:
    count: int  # queries
    past: int  # keys written in earlier steps
    kind: str  # which keys its queries see


@dataclass(frozen=True)
class Inputs:
    """Numpy arguments of one call, and which tokens are real."""

    q: np.ndarray
    k_new: np.ndarray
    v_new: np.ndarray | None
    kv: KVPages
    batch: AttentionBatch
    sinks: np.ndarray | None
    num_tokens: int

    def arguments(self) -> tuple[Any, ...]:
        return self.q, self.k_new, self.v_new, self.kv, self.batch, self.sinks


@st.composite
def ragged_rows(draw: st.DrawFn, case: Case) -> list[Row]:
    counts: list[int] = []
    most = min(37, case.tokens) if case.items else 1
    for _ in range(draw(st.integers(1, case.rows))):
        room = case.tokens - sum(counts)
        if room:
            counts.append(draw(st.one_of(st.just(1), st.integers(1, min(most, room)))))
    kinds = st.sampled_from(["causal", "window", "everything", "chunked", "any"])
    longest = case.width * case.page_size
    return [
        Row(count, draw(st.integers(0, longest - count)), draw(kinds)) for count in sorted(counts)
    ]


def key_ranges(row: Row, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """attend_from and attend_to of the row's queries, inside its own keys."""
    length = row.past + row.count
    position = np.arange(row.past, length)
    match row.kind:
        case "causal":
            return np.zeros_like(position), position + 1
        case "window":
            return np.maximum(position + 1 - rng.integers(1, length + 1), 0), position + 1
        case "everything":
            return np.zeros_like(position), np.full_like(position, length)
        case "chunked":
            size = rng.integers(1, length + 1)
            return position // size * size, np.minimum((position // size + 1) * size, length)
        case _:
            ends = np.sort(rng.integers(0, length + 1, (2, row.count)), axis=0)
            return ends[0], ends[1]  # some see nothing


def make_inputs(case: Case, rows: list[Row], seed: int) -> Inputs:
    rng = np.random.default_rng(seed)

    def noise(*shape: int, dtype: str = case.dtype) -> np.ndarray:
        return rng.normal(0, 1, shape).astype(jnp.dtype(dtype))

    def poison(*shape: int, dtype: str) -> np.ndarray:
        return np.full(shape, np.nan, jnp.dtype(dtype))

    cache_shape = (case.num_pages, case.kv_heads, case.page_size)
    k = poison(*cache_shape, case.head_dim, dtype=case.kv_dtype)
    v = poison(*cache_shape, case.value_dim, dtype=case.kv_dtype)
    total = sum(row.count for row in rows)
    q = poison(case.tokens, case.heads, case.head_dim, dtype=case.dtype)
    k_new = poison(case.tokens, case.kv_heads, case.head_dim, dtype=case.dtype)
    v_new = poison(case.tokens, case.kv_heads, case.value_dim, dtype=case.dtype)
    for array in (q, k_new, v_new):
        array[:total] = noise(total, *array.shape[1:])

    per_token = {name: np.zeros(case.tokens, np.int32) for name in ("from", "to", "row", "offset")}
    write_page = np.full(case.tokens, case.num_pages, np.int32)
    table = np.zeros((case.rows, case.width), np.int32)
    free = rng.permutation(np.arange(1, case.num_pages)).tolist()
    items: list[tuple[int, int, int]] = []
    token = 0
    for i, row in enumerate(rows):
        length = row.past + row.count
        pages = [free.pop() for _ in range(-(-length // case.page_size))]
        positions = np.arange(length)
        page, offset = np.array(pages)[positions // case.page_size], positions % case.page_size
        k[page[: row.past], :, offset[: row.past]] = noise(
            row.past, case.kv_heads, case.head_dim, dtype=case.kv_dtype
        )
        v[page[: row.past], :, offset[: row.past]] = noise(
            row.past, case.kv_heads, case.value_dim, dtype=case.kv_dtype
        )
        here = slice(token, token + row.count)
        per_token["from"][here], per_token["to"][here] = start, end = key_ranges(row, rng)
        per_token["row"][here] = i
        per_token["offset"][here] = offset[row.past :]
        write_page[here] = page[row.past :]
        table[i, : len(pages)] = pages
        # Pages that fell out of every window are freed: their entries go to the null page. A page
        # that is written is kept by the scheduler.
        seen = start[end > start]
        lowest = min(int(seen.min()) if seen.size else row.past, row.past)
        table[i, : lowest // case.page_size] = 0
        if row.count > 1:
            most = case.queries_per_item
            items += [
                (i, token + at, min(most, row.count - at)) for at in range(0, row.count, most)
            ]
        token += row.count
    columns = np.zeros((3, case.items), np.int32)
    if items:
        columns[:, : len(items)] = np.array(items).T
    batch = AttentionBatch(
        attend_from=per_token["from"],
        attend_to=per_token["to"],
        token_row=per_token["row"],
        write_page=write_page,
        write_offset=per_token["offset"],
        page_table=table,
        num_tokens=np.int32(total),
        num_single=np.int32(sum(row.count == 1 for row in rows)),
        num_items=np.int32(len(items)),
        item_row=columns[0],
        item_first=columns[1],
        item_count=columns[2],
    )
    sinks = rng.normal(0, 2, case.heads).astype(np.float32) if case.has_sinks else None
    if case.is_latent:
        return Inputs(q, k_new, None, KVPages(k, None), batch, sinks, total)
    return Inputs(q, k_new, v_new, KVPages(k, v), batch, sinks, total)


def by_loop(inputs: Inputs, case: Case) -> np.ndarray:
    """The op in float64, one query, one head and one key at a time."""
    k, v = written(inputs)
    k = k.astype(np.float64)
    v = k[..., : case.value_dim] if v is None else v.astype(np.float64)
    b = inputs.batch
    out = np.zeros((case.tokens, case.heads, case.value_dim))
    for t in range(inputs.num_tokens):
        for h in range(case.heads):
            kv_head = h // (case.heads // case.kv_heads)
            scores, values = [], []
            for position in range(b.attend_from[t], b.attend_to[t]):
                page = b.page_table[b.token_row[t], position // case.page_size]
                at = (page, kv_head, position % case.page_size)
                score = float(inputs.q[t, h].astype(np.float64) @ k[at]) * case.spec.scale
                if case.soft_cap is not None:
                    score = case.soft_cap * np.tanh(score / case.soft_cap)
                scores.append(score)
                values.append(v[at])
            sink = [] if inputs.sinks is None else [float(inputs.sinks[h])]
            weights = np.exp(np.array(scores + sink, np.float64))
            if scores:
                out[t, h] = weights[: len(scores)] @ np.array(values) / weights.sum()
    return out


def written(inputs: Inputs) -> tuple[np.ndarray, np.ndarray | None]:
    """The cache with the new keys and values in their slots, and nothing else changed."""
    made = []
    for pages, new in ((inputs.kv.k, inputs.k_new), (inputs.kv.v, inputs.v_new)):
        if pages is None:
            made.append(None)
            continue
        pages = pages.copy()
        for t in range(inputs.num_tokens):
            page, offset = inputs.batch.write_page[t], inputs.batch.write_offset[t]
            pages[page, :, offset] = new[t].astype(pages.dtype)
        made.append(pages)
    return made[0], made[1]


def assert_same_bytes(actual: Any, expected: np.ndarray) -> None:
    """Bit for bit, NaN included."""
    width = f"u{expected.dtype.itemsize}"
    np.testing.assert_array_equal(np.asarray(actual).view(width), expected.view(width))


def assert_close(actual: Any, expected: Any, bound: float) -> None:
    actual, expected = (np.asarray(a).astype(np.float64) for a in (actual, expected))
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, expected, rtol=bound, atol=bound)
