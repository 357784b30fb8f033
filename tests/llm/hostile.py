"""Makes everything a request does not own as harmful as it can be, before every step.

Unowned KV positions and the null page hold NaN, idle device rows hold garbage, and a host array is
overwritten as soon as it was dispatched. Answers must not change.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from quire import LLM
from quire.engine.core import EngineCore
from quire.engine.runner import Runner
from quire.layers.programs import Hidden
from quire.layers.rows import RowState
from quire.pallas_kernels.checks import KVPages

GARBAGE = 0x5BADBADB


def make_hostile(llm: LLM) -> None:
    """Wrap the runner of an idle engine."""
    core = llm._engine.core
    runner = core.runner
    forward, update_rows = runner.forward, runner.update_rows

    def hostile_forward(packed: np.ndarray, tokens: int) -> Hidden:
        _poison_pages(core, runner)
        _poison_idle_rows(core, runner)
        hidden = forward(packed, tokens)
        packed[:] = GARBAGE
        return hidden

    def hostile_update(packed: np.ndarray, tables: Any = None) -> None:
        update_rows(packed, tables)
        packed[:] = GARBAGE
        for array in dataclasses.astuple(tables) if tables is not None else ():
            array[:] = 7

    runner.forward = hostile_forward  # type: ignore[method-assign]
    runner.update_rows = hostile_update  # type: ignore[method-assign]


def _poison_pages(core: EngineCore, runner: Runner) -> None:
    """NaN in every position that neither a request has computed nor the prefix cache keeps."""
    scheduler = core.scheduler
    page_size = scheduler.config.page_size
    owned = np.zeros((runner.num_pages, page_size), bool)
    for page in range(1, runner.num_pages):
        owned[page] = scheduler.prefix_cache is not None and scheduler.pool.is_kept(page)
    first = {c.request.request_id: c.first for c in core._last_plan.chunks}
    for request in scheduler.running:
        length = first.get(request.request_id, request.num_computed)
        for table in request.pages:
            for i, page in enumerate(table):
                if page:
                    owned[page, : max(0, length - i * page_size)] = True

    def poison(cache: jax.Array, *, is_turned: bool) -> jax.Array:
        values = np.array(cache)
        *pages, kv_heads, _, dim = values.shape
        if is_turned:
            inside = values.reshape(*pages, kv_heads, dim, page_size)
            inside[np.broadcast_to(~owned[:, None, None, :], inside.shape)] = np.nan
        else:
            values[np.broadcast_to(~owned[:, None, :, None], values.shape)] = np.nan
        return jax.device_put(values, cache.sharding)

    # The native kernel holds the keys of a page as [head_dim, page_size].
    is_native = runner.programs.ctx.ops.attention.name == "native"
    runner._kv = tuple(
        KVPages(poison(kv.k, is_turned=is_native), poison(kv.v, is_turned=False))
        for kv in runner._kv
    )


def _poison_idle_rows(core: EngineCore, runner: Runner) -> None:
    used = {request.slot for request in core.scheduler.running}
    idle = [slot for slot in range(runner.buckets.slots) if slot not in used]

    def poison(state: jax.Array) -> jax.Array:
        values = np.array(state)
        values[idle] = np.nan if values.dtype.kind == "f" else 123
        return jax.device_put(values, state.sharding)

    state: RowState = runner._rows
    runner._rows = jax.tree.map(poison, state)
    runner._lengths = poison(runner._lengths)
