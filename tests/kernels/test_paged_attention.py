"""The implementations against reference, and reference against a plain float64 loop.

Everything that no request owns holds NaN: paged_inputs.py.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quire.cpu_kernels.library import Library
from quire.pallas_kernels import reference
from quire.pallas_kernels.checks import AttentionBatch, KVPages
from quire.pallas_kernels.registry import PAGED_ATTENTION, cpu_library

from .paged_inputs import (
    SEEDS,
    TOLERANCE,
    Case,
    Row,
    assert_close,
    assert_same_bytes,
    by_loop,
    make_inputs,
    ragged_rows,
    written,
)

CASES = {
    "f32": Case(40, 9, 40, 4, 4, 2, 8, 8, 11),
    "bf16-capped": Case(24, 9, 20, 16, 6, 1, 16, 16, 10, "bfloat16", "bfloat16", soft_cap=2.0),
    "f16-sinks": Case(40, 6, 5, 64, 4, 4, 16, 8, 8, "float16", "float16", has_sinks=True),
    "latent": Case(
        40, 5, 12, 16, 4, 1, 24, 16, 6, "float32", "bfloat16", 3.0, has_sinks=True, is_latent=True
    ),
    "one-query": Case(3, 3, 12, 16, 4, 2, 8, 8, 0),
}
# The library is there wherever there was a compiler; its own levels: tests/kernels/test_native.py.
NAMES = ["jnp", *(["native"] if isinstance(cpu_library(), Library) else [])]


# On AMX the weights of 16-bit keys are bfloat16.
TOLERANCE_OF_TILES = 2**-7


def bound(case: Case, name: str) -> float:
    library = cpu_library()
    is_amx = isinstance(library, Library) and library.level == "amx"
    has_tiles = is_amx and name == "native" and case.kv_dtype != "float32"
    return TOLERANCE_OF_TILES if has_tiles else TOLERANCE[case.dtype]


@cache
def compiled(case: Case, name: str) -> Any:
    op = {i.name: i for i in PAGED_ATTENTION}[name]

    def turned(k: Any, rows: int, columns: int) -> Any:
        """A K page of the native kernel holds its numbers as [head_dim, page_size]."""
        if name != "native":
            return k
        return k.reshape(*k.shape[:2], rows, columns).swapaxes(2, 3).reshape(k.shape)

    def call(q: Any, k_new: Any, v_new: Any, kv: KVPages, batch: AttentionBatch, sinks: Any) -> Any:
        plan = op.plan(batch, case.page_size, case.heads // case.kv_heads)
        kv = KVPages(turned(kv.k, case.page_size, case.head_dim), kv.v)
        out, kv = op.run(q, k_new, v_new, kv, batch, plan, case.spec, sinks)
        return out, KVPages(turned(kv.k, case.head_dim, case.page_size), kv.v)

    return jax.jit(call)


FEW = settings(max_examples=12, deadline=None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@given(st.data(), SEEDS)
@FEW
def test_each_gives_what_the_reference_gives(case: Case, name: str, data: st.DataObject, seed: int):
    inputs = make_inputs(case, data.draw(ragged_rows(case)), seed)
    out, kv = compiled(case, name)(*inputs.arguments())
    want, want_kv = compiled(case, "reference")(*inputs.arguments())
    assert out.dtype == want.dtype == jnp.dtype(case.dtype)
    assert_close(out, want, bound(case, name))
    assert not np.asarray(out)[inputs.num_tokens :].any()
    k, v = written(inputs)
    for pages in (kv, want_kv):
        assert_same_bytes(pages.k, k)
        assert pages.v is None if v is None else assert_same_bytes(pages.v, v) is None


@pytest.mark.parametrize("name", ["f32", "f16-sinks", "latent"])
@given(st.data(), SEEDS)
@settings(FEW, max_examples=4)
def test_reference_gives_what_a_plain_loop_gives(name: str, data: st.DataObject, seed: int):
    case = CASES[name]
    inputs = make_inputs(case, data.draw(ragged_rows(case)), seed)
    out, _ = compiled(case, "reference")(*inputs.arguments())
    assert_close(out, by_loop(inputs, case), bound(case, "reference"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("row", [1, 3])
def test_a_row_is_the_same_to_the_bit_whatever_its_neighbours_do(row: int, name: str):
    """The others see nothing, or their keys are NaN: same chunks, same order of sums."""
    case = CASES["f32"]
    rows = [Row(1, 150, "causal"), Row(1, 90, "window"), Row(3, 130, "any"), Row(20, 20, "causal")]
    inputs = make_inputs(case, rows, seed=1)
    before, _ = compiled(case, name)(*inputs.arguments())
    is_mine = inputs.batch.token_row == row
    is_mine[inputs.num_tokens :] = False
    k = np.full_like(inputs.kv.k, np.nan)
    mine = inputs.batch.page_table[row]
    k[mine] = inputs.kv.k[mine]
    batch = replace(inputs.batch, attend_to=np.where(is_mine, inputs.batch.attend_to, 0))
    changed = replace(inputs, kv=KVPages(k, inputs.kv.v), batch=batch)
    after, _ = compiled(case, name)(*changed.arguments())
    assert np.asarray(before)[is_mine].any()
    assert_same_bytes(np.asarray(after)[is_mine], np.asarray(before)[is_mine])


@pytest.mark.parametrize("name", NAMES)
def test_an_unused_item_overwrites_nothing(name: str):
    """One place for items, none of them used, beside one-query rows."""
    case = replace(CASES["f32"], items=1)
    inputs = make_inputs(case, [Row(1, past, "causal") for past in (3, 9, 20)], seed=2)
    out, _ = compiled(case, name)(*inputs.arguments())
    want, _ = compiled(case, "reference")(*inputs.arguments())
    assert np.asarray(want)[: inputs.num_tokens].all(axis=(1, 2)).any()
    assert_close(out, want, bound(case, name))


def test_donated_pages_are_written_in_place():
    inputs = make_inputs(CASES["f32"], [Row(1, 3, "causal")], 0)
    write = jax.jit(reference.write_kv, donate_argnums=2)
    kv = jax.tree.map(jnp.asarray, inputs.kv)
    memory = write.lower(inputs.k_new, inputs.v_new, kv, inputs.batch).compile().memory_analysis()
    assert memory.alias_size_in_bytes == inputs.kv.k.nbytes + inputs.kv.v.nbytes
