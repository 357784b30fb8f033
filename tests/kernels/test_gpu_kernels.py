"""The GPU kernels on CPU: in the interpreter, with race detection, against reference; and lowered.

The interpreter takes what lowering refuses, so each case does both. Compiled for a device they are
in tests/gpu_compile.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quire.pallas_kernels import attention_gpu, reference
from quire.pallas_kernels.attention_gpu_heads import Preparation, write_heads
from quire.pallas_kernels.attention_gpu_tile import Geometry
from quire.pallas_kernels.checks import AttentionShape, KVPages
from quire.pallas_kernels.heads import HeadNorms, split_heads
from quire.pallas_kernels.registry import choose

from .gpu_cases import (
    COMPILED,
    INTERPRETED_OTHERWISE,
    MIXED,
    RUN,
    interpreted,
    on_device,
    shapes_of,
)
from .paged_inputs import (
    SEEDS,
    Case,
    Inputs,
    Row,
    assert_same_bytes,
    make_inputs,
    ragged_rows,
    written,
)
from .test_paged_attention import compiled

NAME = "mosaic-interpreted"
# q, the weights and the output of several queries are rounded to the cache's dtype: three times
# half a unit in the last place of numbers up to 4.
TOLERANCE = {"float16": 2**-8, "bfloat16": 2**-5}


def run(case: Case, inputs: Inputs) -> tuple[np.ndarray, KVPages]:
    with interpreted():
        out, kv = compiled(case, NAME)(*inputs.arguments())
        return np.asarray(out), jax.tree.map(np.asarray, kv)


def assert_is_right(case: Case, inputs: Inputs) -> None:
    out, kv = run(case, inputs)
    want, _ = compiled(case, "reference")(*inputs.arguments())
    assert out.dtype == want.dtype == jnp.dtype(case.dtype)
    assert np.isfinite(out.astype(np.float64)).all()
    bound = TOLERANCE[case.kv_dtype]
    np.testing.assert_allclose(
        out.astype(np.float64), np.asarray(want).astype(np.float64), rtol=bound, atol=bound
    )
    assert not out[inputs.num_tokens :].any()
    k, v = written(inputs)
    assert_same_bytes(kv.k, k)
    assert v is None or assert_same_bytes(kv.v, v) is None


@pytest.mark.parametrize("case", RUN.values(), ids=RUN)
def test_a_step_of_every_kind_of_row(case: Case):
    rows = MIXED if case.items else [r for r in MIXED if r.count == 1]
    assert_is_right(case, make_inputs(case, rows, seed=4))


@pytest.mark.parametrize("name", ["llama", "one-query"])
@given(st.data(), SEEDS)
@settings(max_examples=4, deadline=None)
def test_any_ragged_step(name: str, data: st.DataObject, seed: int):
    case = RUN[name]
    assert_is_right(case, make_inputs(case, data.draw(ragged_rows(case)), seed))


@pytest.mark.parametrize("row", [2, 5])
def test_a_row_is_the_same_to_the_bit_whatever_its_neighbours_do(row: int):
    """The others see nothing, and their keys are NaN."""
    case = RUN["llama"]
    inputs = make_inputs(case, MIXED, seed=1)
    before, _ = run(case, inputs)
    is_mine = inputs.batch.token_row == row
    is_mine[inputs.num_tokens :] = False
    k, v = (np.full_like(pages, np.nan) for pages in inputs.kv)
    mine = inputs.batch.page_table[row]
    k[mine], v[mine] = inputs.kv.k[mine], inputs.kv.v[mine]
    batch = replace(inputs.batch, attend_to=np.where(is_mine, inputs.batch.attend_to, 0))
    after, _ = run(case, replace(inputs, kv=KVPages(k, v), batch=batch))
    assert before[is_mine].any()
    assert_same_bytes(after[is_mine], before[is_mine])


def test_items_that_a_step_does_not_use_overwrite_nothing():
    case = RUN["llama"]
    assert_is_right(case, make_inputs(case, [Row(1, past, "causal") for past in (3, 9, 20)], 2))


@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED)
def test_it_lowers_for_cuda(case: Case):
    lowered = jax.jit(on_device(case)).trace(*shapes_of(case)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") >= (3 if case.items else 2)


@pytest.mark.parametrize("name", ["llama", "group-of-7", "tiny"])
@pytest.mark.parametrize("parts", ["", "rotated", "rotated normed"])
def test_heads_and_cache_are_written_by_one_kernel(name: str, parts: str):
    """Against heads.split_heads and reference.write_kv; padded tokens write no page."""
    case = RUN[name]
    inputs = make_inputs(case, [Row(1, 20, "causal"), Row(3, 14, "causal")], seed=3)
    rng = np.random.default_rng(5)
    tables = norms = None
    if "rotated" in parts:
        tables = tuple(rng.uniform(-1, 1, (2, case.tokens, case.head_dim)).astype(np.float32))
    if "normed" in parts:
        norms = HeadNorms(*rng.uniform(0.5, 2, (2, case.head_dim)).astype(np.float16))
    row = [np.asarray(x, np.float32) for x in (inputs.q, inputs.k_new, inputs.v_new)]
    qkv = np.concatenate([x.reshape(case.tokens, -1) for x in row], axis=1)
    group, eps = case.heads // case.kv_heads, 1e-6
    g = Geometry(
        group, case.kv_heads, case.head_dim, case.value_dim, case.page_size,
        jnp.dtype(case.kv_dtype), 1.0, None, True,
    )  # fmt: skip

    def kernel(qkv: jax.Array, kv: KVPages) -> tuple[jax.Array, KVPages]:
        return write_heads(qkv, kv, inputs.batch, Preparation(tables, norms, eps), g)

    def plain(qkv: jax.Array, kv: KVPages) -> tuple[jax.Array, KVPages]:
        q, k, v = split_heads(qkv, case.kv_heads, case.head_dim, tables, norms, eps)
        return q, reference.write_kv(k, v, kv, inputs.batch)

    with interpreted():
        q, kv = jax.tree.map(np.asarray, jax.jit(kernel)(qkv, inputs.kv))
    want, want_kv = jax.tree.map(np.asarray, jax.jit(plain)(qkv, inputs.kv))
    by_head = want.reshape(case.tokens, case.kv_heads, group, -1).swapaxes(0, 1)
    real = slice(inputs.num_tokens)
    # Half a unit in the last place of the cache's dtype, of whatever size.
    bound = float(jnp.finfo(case.kv_dtype).eps)
    pairs = [(q[:, real, :group], by_head[:, real]), *zip(kv, want_kv, strict=True)]
    for actual, expected in pairs:
        np.testing.assert_allclose(
            actual.astype(np.float32), expected.astype(np.float32), rtol=bound, atol=bound
        )


def test_what_the_interpreter_does_otherwise():
    """The variants are two lines of one function; a third would have to be listed, too."""
    assert len(INTERPRETED_OTHERWISE) == 2


SERVED = AttentionShape(32, 8, 128, 128, 64, jnp.float16)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"kv_dtype": jnp.bfloat16}, {"page_size": 16}, {"heads": 56}, {"heads": 8},
        {"head_dim": 192}, {"head_dim": 80, "value_dim": 80}, {"head_dim": 256, "value_dim": 256},
    ],
)  # fmt: skip
def test_shapes_that_are_served(changes: dict[str, object]):
    assert choose("cuda", shape=replace(SERVED, **changes)).attention.name == "mosaic"


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_dtype": jnp.float32}, {"page_size": 8}, {"page_size": 128}, {"value_dim": None},
        {"head_dim": 512}, {"head_dim": 72}, {"heads": 512},
    ],
)  # fmt: skip
def test_shapes_that_fall_to_jnp(changes: dict[str, object]):
    assert choose("cuda", shape=replace(SERVED, **changes)).attention.name == "jnp"


def test_an_item_is_two_tiles_of_whole_queries():
    for heads, queries in ((8, 128), (32, 32), (56, 18), (64, 16), (256, 4)):
        assert attention_gpu.HOPPER.queries_per_item(replace(SERVED, heads=heads)) == queries
