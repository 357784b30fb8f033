"""Paged attention over a table of shapes: time, share of the roofline, and who else does it.

Decode: every sequence has one query, and its keys are read once: bytes. Prefill: whole prompts:
FLOPs of the keys that are seen. The new keys' write into their pages is in both.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...pallas_kernels.checks import AttentionBatch, AttentionShape, AttentionSpec, KVPages
from ...pallas_kernels.registry import Ops, choose
from .ceilings import Ceilings
from .results import Results
from .timing import Bench, Timed

LEAST_OF_COPY, LEAST_OF_CUDNN = 0.8, 0.75


@dataclass(frozen=True)
class Case:
    """`queries` new tokens of each of `sequences`, which see at most `context` keys."""

    sequences: int
    queries: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64
    dtype: Any = jnp.float16  # of the pages
    window: int | None = None
    soft_cap: float | None = None

    @property
    def name(self) -> str:
        kind = "decode" if self.queries == 1 else "prefill"
        parts = [f"{self.sequences}x{self.context}", f"h{self.heads}/{self.kv_heads}"]
        parts += [f"d{self.head_dim}", f"p{self.page_size}", jnp.dtype(self.dtype).name]
        parts += [f"w{self.window}"] * bool(self.window) + [f"c{self.soft_cap}"] * bool(
            self.soft_cap
        )
        return f"{kind}[{','.join(parts)}]"

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(
            heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim,
            value_dim=self.head_dim, page_size=self.page_size, kv_dtype=jnp.dtype(self.dtype),
        )  # fmt: skip

    @property
    def keys_seen(self) -> int:
        """By all queries of a sequence."""
        ends = np.arange(self.context - self.queries, self.context) + 1
        return int((ends if self.window is None else np.minimum(ends, self.window)).sum())

    @property
    def bytes_read(self) -> int:
        """Of keys and values, each once."""
        keys = self.context if self.window is None else min(self.context, self.window)
        size = jnp.dtype(self.dtype).itemsize
        return 2 * self.sequences * keys * self.kv_heads * self.head_dim * size

    @property
    def flops(self) -> int:
        return 4 * self.sequences * self.keys_seen * self.heads * self.head_dim


DECODE = (
    Case(64, 1, 4096),
    Case(64, 1, 4096, dtype=jnp.bfloat16),
    Case(64, 1, 4096, page_size=16),
    Case(64, 1, 4096, head_dim=64),
    Case(64, 1, 4096, heads=16, kv_heads=4, head_dim=256),
    Case(64, 1, 4096, heads=8, kv_heads=8),
    Case(64, 1, 4096, window=1024),
    Case(64, 1, 4096, soft_cap=30.0),
    Case(1, 1, 4096),
    Case(1, 1, 32768),
    Case(8, 1, 8192),
    Case(256, 1, 1024),
)
PREFILL = (
    Case(8, 2048, 2048),
    Case(8, 2048, 2048, dtype=jnp.bfloat16),
    Case(8, 2048, 2048, head_dim=64),
    Case(8, 2048, 2048, heads=16, kv_heads=4, head_dim=256),
    Case(8, 2048, 2048, heads=16, kv_heads=16),
    Case(1, 8192, 8192),
    Case(1, 2048, 16384),
    Case(32, 256, 4096),
    Case(8, 2048, 2048, window=512),
)


def measure(bench: Bench, results: Results, ceilings: Ceilings) -> None:
    for case in (*DECODE, *PREFILL):
        results.section(case.name, partial(_measure_case, case, bench, results, ceilings))


def _measure_case(case: Case, bench: Bench, results: Results, ceilings: Ceilings) -> None:
    platform = "cpu" if bench.target.platform == "cpu" else "cuda"
    ops = choose(platform, dtype=jnp.bfloat16, shape=case.shape)
    timed = time_attention(case, ops, bench)
    is_decode = case.queries == 1
    floor_s = max(
        case.bytes_read / ceilings.copy_bytes_per_s, case.flops / ceilings.matmul_flops_per_s
    )
    share = timed.rate(floor_s)
    more: dict[str, Any] = {
        "by": ops.attention.name, "us": _micro(timed.seconds), "floor_us": floor_s * 1e6,
        "bytes": case.bytes_read, "flops": case.flops,
    }  # fmt: skip
    is_target = case in (DECODE[0], PREFILL[0])
    results.add(
        f"{case.name} share of roofline",
        share,
        "of 1",
        least=LEAST_OF_COPY if is_target and is_decode else None,
        **more,
        **timed.facts(),
    )
    if not bench.measured:
        return
    plain = choose(platform, attention="jnp", dtype=jnp.bfloat16)
    if ops.attention.name != "jnp":
        other = time_attention(case, plain, bench)
        assert timed.seconds is not None
        assert other.seconds is not None
        speedup = other.seconds / timed.seconds
        results.add(f"{case.name} ahead of jnp", speedup, "times", us=_micro(other.seconds))
    if not is_decode and platform == "cuda":
        _compare_with_cudnn(case, timed, bench, results, is_target=is_target)


def _compare_with_cudnn(
    case: Case, timed: Timed, bench: Bench, results: Results, *, is_target: bool
) -> None:
    """Without pages: what its users would gather them for."""
    if case.queries != case.context or case.head_dim > 128:
        return
    rng = np.random.default_rng(0)

    def noise(heads: int) -> jax.Array:
        shape = (case.sequences, case.queries, heads, case.head_dim)
        return jnp.asarray(rng.standard_normal(shape, np.float32), case.dtype)

    window = None if case.window is None else (case.window - 1, 0)

    def attend(q: jax.Array, kv: tuple[jax.Array, jax.Array]) -> jax.Array:
        made = jax.nn.dot_product_attention(
            q, *kv, is_causal=True, local_window_size=window, implementation="cudnn"
        )
        return made.astype(q.dtype)

    other = bench.seconds(attend, noise(case.heads), (noise(case.kv_heads), noise(case.kv_heads)))
    assert timed.seconds is not None
    assert other.seconds is not None
    results.add(
        f"{case.name} beside cuDNN",
        other.seconds / timed.seconds,
        "times",
        least=LEAST_OF_CUDNN if is_target else None,
        us=_micro(other.seconds),
    )


def time_attention(case: Case, ops: Ops, bench: Bench) -> Timed:
    """Of one layer's call; the plan is made once, as in a step."""
    batch = make_batch(case, ops.queries_per_item)
    make_plan = partial(ops.plan_attention, page_size=case.page_size)
    step = jax.jit(make_plan)(batch) if bench.measured else jax.eval_shape(make_plan, batch)
    spec = AttentionSpec(case.head_dim**-0.5, case.soft_cap)

    def attend(carry: Any, fixed: Any) -> Any:
        q, kv = carry
        (k_new, v_new), step = fixed
        out, kv = ops.attention.run(q, k_new, v_new, kv, *step, spec, None)
        return q + out * 1e-3, kv  # each waits for the one before

    q, new, kv = make_arrays(case, bench.measured)
    return bench.seconds(attend, (q, kv), (new, step))


def make_arrays(case: Case, is_real: bool) -> tuple[Any, tuple[Any, Any], KVPages]:
    tokens = case.sequences * case.queries

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        if not is_real:
            return jax.ShapeDtypeStruct(shape, dtype)
        return jax.random.normal(jax.random.key(len(shape)), shape, jnp.float32).astype(dtype)

    q = array((tokens, case.heads, case.head_dim), jnp.float32)
    new = array((tokens, case.kv_heads, case.head_dim), jnp.float32)
    num_pages = 1 + case.sequences * _pages(case)
    pages = array((num_pages, case.kv_heads, case.page_size, case.head_dim), case.dtype)
    other = jnp.array(pages) if is_real else pages  # both are donated
    return q, (new, new), KVPages(pages, other)


def _pages(case: Case) -> int:
    return -(-case.context // case.page_size)


def make_batch(case: Case, queries_per_item: int) -> AttentionBatch:
    """Pages in an order that nothing but the table knows."""
    per_row = _pages(case)
    order = 1 + np.random.default_rng(0).permutation(case.sequences * per_row)
    table = order.reshape(case.sequences, per_row).astype(np.int32)
    row = np.repeat(np.arange(case.sequences, dtype=np.int32), case.queries)
    position = np.tile(np.arange(case.context - case.queries, case.context), case.sequences)
    end = (position + 1).astype(np.int32)
    start = np.zeros_like(end) if case.window is None else np.maximum(end - case.window, 0)
    items = np.zeros((3, 0), np.int32)
    if case.queries > 1:
        firsts = [
            (r, r * case.queries + at, min(queries_per_item, case.queries - at))
            for r in range(case.sequences)
            for at in range(0, case.queries, queries_per_item)
        ]
        items = np.array(firsts, np.int32).T
    return AttentionBatch(
        attend_from=start.astype(np.int32),
        attend_to=end,
        token_row=row,
        write_page=table[row, position // case.page_size],
        write_offset=(position % case.page_size).astype(np.int32),
        page_table=table,
        num_tokens=np.int32(row.size),
        num_single=np.int32(case.sequences if case.queries == 1 else 0),
        num_items=np.int32(items.shape[1]),
        item_row=items[0],
        item_first=items[1],
        item_count=items[2],
    )  # type: ignore[arg-type]  # numpy stands for jax


def _micro(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e6
