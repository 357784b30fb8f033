"""The shapes and features for which the GPU kernels are shown to be right, to lower and to compile.

`run` in the interpreter, all of COMPILED for a device too. What the interpreter cannot do the
kernels do another way there: INTERPRETED_OTHERWISE.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from quire.pallas_kernels.attention_gpu import HOPPER

from .paged_inputs import Case, Row, make_inputs

# Operations of the kernels that the interpreter lacks, and what stands for them.
INTERPRETED_OTHERWISE = {
    "wgmma with the weights in registers": "the same product with the weights in shared memory",
    "accumulation in place (pl.run_state)": "a product of its own that is added",
}

_BASE = Case(
    tokens=56, rows=6, width=10, page_size=16, heads=4, kv_heads=2, head_dim=64, value_dim=64,
    items=4, kv_dtype="float16", queries_per_item=64,
)  # fmt: skip
RUN = {
    "llama": _BASE,
    "group-of-7": replace(
        _BASE, heads=7, kv_heads=1, head_dim=128, value_dim=128, width=3, page_size=64, items=7,
        queries_per_item=18, dtype="bfloat16", kv_dtype="bfloat16", soft_cap=2.0, has_sinks=True,
    ),
    "widest": replace(
        _BASE, heads=2, kv_heads=1, head_dim=256, value_dim=256, width=5, page_size=32
    ),
    "odd-heads": replace(
        _BASE, heads=3, kv_heads=3, head_dim=96, value_dim=80, queries_per_item=128, has_sinks=True
    ),
    "tiny": replace(
        _BASE, heads=8, kv_heads=1, head_dim=16, value_dim=16, queries_per_item=16, items=8
    ),
    "one-query": replace(_BASE, tokens=6, items=0, head_dim=192, value_dim=128, dtype="bfloat16"),
}  # fmt: skip
# Of the real sizes: a decode step, and one that may hold any rows.
_REAL = replace(
    _BASE, tokens=512, rows=64, width=128, page_size=64, heads=32, kv_heads=8, head_dim=128,
    value_dim=128, items=80, queries_per_item=32,
)  # fmt: skip
COMPILED = RUN | {
    "8b-decode": replace(_REAL, tokens=64, items=0),
    "8b": _REAL,
    "8b-f32-q-bf16": replace(_REAL, kv_dtype="bfloat16"),
    "8b-page-16": replace(_REAL, page_size=16, width=512),
    "8b-one-of-8": replace(_REAL, heads=4, kv_heads=1),
    "group-of-8": replace(_REAL, heads=64, queries_per_item=16, items=96),
    "every-head": replace(_REAL, heads=16, kv_heads=16, queries_per_item=128, items=68),
    "64": replace(_REAL, head_dim=64, value_dim=64, soft_cap=30.0, has_sinks=True),
    "80": replace(_REAL, head_dim=80, value_dim=80),
    "96": replace(_REAL, head_dim=96, value_dim=96),
    "192": replace(_REAL, head_dim=192, value_dim=128),
    "256": replace(
        _REAL, heads=16, head_dim=256, value_dim=256, soft_cap=50.0, queries_per_item=64
    ),
    "256-page-16": replace(
        _REAL, page_size=16, width=512, heads=16, head_dim=256, value_dim=256, queries_per_item=64
    ),
}  # fmt: skip

# Rows of each kind: one with one query that sees nothing, one page, several units; chunks of less
# than an item, of more, and one whose queries see nothing.
MIXED = [
    Row(1, 0, "causal"), Row(1, 120, "window"), Row(1, 150, "causal"), Row(2, 37, "any"),
    Row(17, 100, "window"), Row(30, 3, "causal"),
]  # fmt: skip


@contextmanager
def interpreted() -> Iterator[None]:
    """A run of kernels in the interpreter, which must show no race. After one that failed it has to
    be reset.
    """
    try:
        yield
    except BaseException:
        interpret_pallas_call.reset_gpu_interpret_mode_state()
        raise
    assert not interpret_pallas_call.get_races().races_found


def on_device(case: Case) -> Callable[..., Any]:
    """The op as a GPU runs it; its fourth argument, the cache, is to be donated."""

    def call(q: Any, k_new: Any, v_new: Any, kv: Any, batch: Any, sinks: Any) -> Any:
        plan = HOPPER.plan(batch, case.page_size, case.heads // case.kv_heads)
        return HOPPER.run(q, k_new, v_new, kv, batch, plan, case.spec, sinks)

    return call


def shapes_of(case: Case, sharding: Any = None) -> Any:
    """The arguments of `on_device`, without their numbers, and with a few pages only."""
    small = make_inputs(replace(case, width=1), [Row(1, 0, "causal")], 0)
    table = np.empty((case.rows, case.width), np.int32)
    inputs = replace(small, batch=replace(small.batch, page_table=table))

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding)

    return jax.tree.map(shape, inputs.arguments())
