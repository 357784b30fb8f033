"""The C++ kernels through jax: products, the gated layer, the head and the embedding against numpy,
and that a row's numbers depend on nothing but the row.

Each of the levels that the processor has runs these tests, in a process of its own.
"""

import itertools
import os
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quire.cpu_kernels import ops
from quire.cpu_kernels.library import VARIABLE, Library, load
from quire.cpu_kernels.packing import pack
from quire.pallas_kernels.checks import AttentionBatch, AttentionSpec, KVPages, LayerPages
from quire.pallas_kernels.heads import HeadNorms
from quire.pallas_kernels.registry import choose

FEW = settings(max_examples=15, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)]
ROWS = st.sampled_from([1, 2, 5, 15, 16, 17, 31, 33, 70, 300])
INPUTS = st.sampled_from([1, 8, 31, 32, 33, 64, 100, 320])
OUTPUTS = st.sampled_from([1, 7, 16, 31, 32, 33, 70, 96])
EPSILON = 1e-5


@pytest.fixture(scope="module")
def library() -> Library:
    found = load()
    assert isinstance(found, Library), found
    return found


def normal(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return rng.standard_normal(shape, np.float32).astype(dtype)


def packed(matrix: np.ndarray, *, is_gated: bool = False) -> tuple[np.ndarray, ops.Shape]:
    shape = ops.Shape(*matrix.shape, is_gated=is_gated)
    made = np.zeros(shape.packed, matrix.dtype)
    pack(matrix, 0, shape, made)
    return made, shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(SEEDS, INPUTS, st.lists(st.integers(1, 40), min_size=1, max_size=4), st.booleans())
@FEW
def test_parts_are_packed_one_by_one(
    library: Library, dtype: np.dtype, seed: int, width: int, parts: list[int], is_gated: bool
):
    matrix = normal(np.random.default_rng(seed), 2 * sum(parts), width, dtype=dtype)
    whole, shape = packed(matrix, is_gated=is_gated)
    made = np.zeros_like(whole)
    ends = np.cumsum([0, *parts, *parts])
    for first, end in reversed([*itertools.pairwise(ends)]):
        pack(matrix[first:end], first, shape, made)
    np.testing.assert_array_equal(made.view(np.uint8), whole.view(np.uint8))


def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * weight.astype(np.float64)


def bound(x: np.ndarray, matrix: np.ndarray, *, is_exact: bool) -> np.ndarray:
    """What rounding may do to a product: bfloat16 inputs lose 8 bits, or 16 of them twice."""
    unit = 2**-16 if is_exact or matrix.dtype == np.float32 else 2**-8
    return (np.abs(x) @ np.abs(matrix.astype(np.float64)).T) * unit + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(SEEDS, ROWS, INPUTS, OUTPUTS, st.booleans(), st.booleans(), st.booleans(), st.booleans())
@FEW
def test_linear(
    library: Library, dtype: np.dtype, seed: int, rows: int, width: int, out: int,
    is_exact: bool, has_norm: bool, has_bias: bool, has_residual: bool,
):  # fmt: skip
    rng = np.random.default_rng(seed)
    x, matrix = normal(rng, rows, width), normal(rng, out, width, dtype=dtype)
    norm, bias = normal(rng, width, dtype=dtype), normal(rng, out, dtype=dtype)
    residual = normal(rng, rows, out)
    y = ops.linear(
        x, packed(matrix)[0], out, norm=norm if has_norm else None, epsilon=EPSILON,
        bias=bias if has_bias else None, residual=residual if has_residual else None,
        is_exact=is_exact,
    )  # fmt: skip
    read = normed(x, norm) if has_norm else x.astype(np.float64)
    want = read @ matrix.astype(np.float64).T
    want += (bias.astype(np.float64) if has_bias else 0) + (residual if has_residual else 0)
    assert np.all(np.abs(np.asarray(y) - want) <= bound(read, matrix, is_exact=is_exact))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(SEEDS, ROWS, st.sampled_from([8, 33, 96]), st.sampled_from([1, 16, 24, 48, 100]))
@FEW
def test_mlp(library: Library, dtype: np.dtype, seed: int, rows: int, hidden: int, inner: int):
    rng = np.random.default_rng(seed)
    x, norm = normal(rng, rows, hidden), normal(rng, hidden, dtype=dtype)
    gate_up = normal(rng, 2 * inner, hidden, dtype=dtype)
    down = normal(rng, hidden, inner, dtype=dtype)
    biases = normal(rng, 2 * inner, dtype=dtype), normal(rng, hidden, dtype=dtype)
    for gate_up_bias, down_bias in ((None, None), biases):
        y = ops.mlp(
            x, norm, EPSILON, packed(gate_up, is_gated=True)[0], gate_up_bias, packed(down)[0],
            down_bias, inner,
        )  # fmt: skip
        read = normed(x, norm)
        both = read @ gate_up.astype(np.float64).T
        both += 0 if gate_up_bias is None else gate_up_bias.astype(np.float64)
        gate, up = both[:, :inner], both[:, inner:]
        between = gate / (1 + np.exp(-gate)) * up
        want = x + between @ down.astype(np.float64).T
        want += 0 if down_bias is None else down_bias.astype(np.float64)
        error = bound(read, gate_up, is_exact=False)
        # silu is no steeper than 1.1; both factors carry the error of their products.
        carried = 1.1 * error[:, :inner] * (np.abs(up) + error[:, inner:])
        carried += np.abs(gate) * error[:, inner:]
        allowed = bound(between, down, is_exact=False) + carried @ np.abs(down.astype(np.float64)).T
        assert np.all(np.abs(np.asarray(y) - want) <= allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(SEEDS, st.sampled_from([1, 3, 16, 17, 40]), st.sampled_from([1, 32, 33, 250]))
@FEW
def test_the_head_finds_the_lowest_of_the_highest(
    library: Library, dtype: np.dtype, seed: int, rows: int, vocab: int
):
    """Its logits are those of linear, bit for bit; equal ones are made by equal rows."""
    rng = np.random.default_rng(seed)
    x, matrix = normal(rng, rows, 64), normal(rng, vocab, 64, dtype=dtype)
    matrix[vocab // 2 :] = matrix[: vocab - vocab // 2]
    x[rng.integers(rows)] = 0.0  # all logits equal
    weight, _ = packed(matrix)
    token, is_bad = ops.head_argmax(x, weight, vocab)
    logits = np.asarray(ops.linear(x, weight, vocab))
    np.testing.assert_array_equal(token, logits.argmax(-1))
    assert not np.asarray(is_bad).any()
    x[0, 5] = rng.choice([np.nan, np.inf])
    _, is_bad = ops.head_argmax(x, weight, vocab)
    assert np.asarray(is_bad).tolist() == [1] + [0] * (rows - 1)


@pytest.mark.parametrize("count", [0, 1, 17, 40])
def test_the_head_leaves_padding_out(library: Library, count: int):
    rng = np.random.default_rng(5)
    x, (weight, _) = normal(rng, 40, 64), packed(normal(rng, 90, 64, dtype=DTYPES[1]))
    for head in (ops.head_argmax, partial(ops.head_top_k, k=70)):
        alone = [np.asarray(a) for a in head(x, weight, 90)]
        x_padded = x.copy()
        x_padded[count:] = np.nan
        padded = [np.asarray(a) for a in head(x_padded, weight, 90, count=np.int32(count))]
        for whole, some in zip(alone, padded, strict=True):
            np.testing.assert_array_equal(some[:count], whole[:count])
            rest = np.zeros_like(whole[count:])
            if rest.ndim == 2 and rest.dtype == np.int32:
                rest[:] = np.arange(70)  # group_sums wants different ids
            np.testing.assert_array_equal(some[count:], rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embed_gives_the_rows_and_zeros_outside(library: Library, dtype: np.dtype):
    table = normal(np.random.default_rng(0), 70, 50, dtype=dtype)
    weight, _ = packed(table)
    ids = np.array([0, 69, 3, 33, 70, 2**31 - 1, -1], np.int32)
    rows = np.asarray(ops.embed(ids, weight, 70, 50))
    np.testing.assert_array_equal(rows[:4], table[ids[:4]].astype(np.float32))
    assert not rows[4:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("is_exact", "has_norm"), [(False, True), (True, True), (False, False)])
def test_a_row_is_the_same_to_the_bit_in_any_company(
    library: Library, dtype: np.dtype, is_exact: bool, has_norm: bool
):
    """Alone, among others at any place, with any number of threads, and padded."""
    rng = np.random.default_rng(1)
    width, out = 576, 200
    x, norm = normal(rng, 400, width), normal(rng, width, dtype=dtype)
    weight, _ = packed(normal(rng, out, width, dtype=dtype))
    gate_up, _ = packed(normal(rng, 2 * 96, width, dtype=dtype), is_gated=True)
    down, _ = packed(normal(rng, width, 96, dtype=dtype))
    given_norm = norm if has_norm else None
    linear = partial(ops.linear, norm=given_norm, epsilon=EPSILON, is_exact=is_exact)

    def both(x: np.ndarray, **count: Any) -> tuple[np.ndarray, np.ndarray]:
        y = linear(x, weight, out, **count)
        return np.asarray(y), np.asarray(
            ops.mlp(x, norm, EPSILON, gate_up, None, down, None, 96, **count)
        )

    alone = [both(x[i : i + 1]) for i in range(0, 400, 57)]
    try:
        for threads in (1, 2, 5):
            library.set_threads(threads)
            for rows in (400, 399, 172, 16, 17, 1):
                together = both(x[:rows])
                padded = both(x, count=np.int32(rows))
                for i, (y, z) in zip(range(0, rows, 57), alone, strict=False):
                    np.testing.assert_array_equal(together[0][i], y[0])
                    np.testing.assert_array_equal(together[1][i], z[0])
                    np.testing.assert_array_equal(padded[0][i], y[0])
                    np.testing.assert_array_equal(padded[1][i], z[0])
    finally:
        library.set_threads(1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("has_tables", [False, True])
@pytest.mark.parametrize("has_norms", [False, True])
def test_heads_are_normed_and_rotated_as_by_jnp(
    library: Library, dtype: str, has_tables: bool, has_norms: bool
):
    """Norm weights of float16 models were read as float32."""
    rng = np.random.default_rng(3)
    tokens, heads, kv_heads, dim, page_size = 5, 4, 2, 24, 16
    qkv = normal(rng, tokens, (heads + 2 * kv_heads) * dim)
    at = np.arange(tokens, dtype=np.int32)
    batch = AttentionBatch(
        attend_from=0 * at, attend_to=at + 1, token_row=0 * at, write_page=0 * at + 1,
        write_offset=at, page_table=np.ones((1, 8), np.int32), num_tokens=np.int32(tokens),
        num_single=np.int32(0), num_items=np.int32(1), item_row=np.zeros(1, np.int32),
        item_first=np.zeros(1, np.int32), item_count=np.full(1, tokens, np.int32),
    )  # fmt: skip
    half = rng.uniform(0, 6, (tokens, dim // 2)).astype(np.float32)
    cos, sin = np.cos(half), np.sin(half)
    tables = (np.concatenate([cos, cos], 1), np.concatenate([-sin, sin], 1))
    norms = HeadNorms(*(normal(rng, dim).astype(jnp.dtype(dtype)) for _ in range(2)))
    spec = AttentionSpec(dim**-0.5, norm_epsilon=EPSILON)
    outs = []
    pages = jnp.zeros((3, kv_heads, page_size, dim), jnp.float32)
    for name, kv in (
        ("native", LayerPages(pages[None], pages[None], jnp.int32(0))),
        ("jnp", KVPages(pages, pages)),
    ):
        chosen = choose("cpu", attention=name)
        step = chosen.plan_attention(jax.tree.map(jnp.asarray, batch), page_size)
        out, _ = chosen.attend(
            jnp.asarray(qkv), kv, step, spec, tables if has_tables else None,
            norms if has_norms else None,
        )  # fmt: skip
        outs.append(np.asarray(out))
    np.testing.assert_allclose(outs[0], outs[1], rtol=2e-5, atol=2e-5)


def one_token(
    qkv: jax.Array, k: jax.Array, v: jax.Array, layer: int
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Attention of a token that is the second of its row, by one head of 8; the row has page 1."""
    at = np.ones(1, np.int32)
    batch = (0 * at, 2 * at, 0 * at, at, at, at[None], np.int32(1), np.int32(0), *(0 * at,) * 3)
    return ops.attention(
        qkv, k, v, jnp.int32(layer), batch, heads=1, value_dim=8, scale=1.0, soft_cap=None,
        sinks=None, tables=None, norms=None, epsilon=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("page", [jnp.float8_e4m3fn, jnp.int16])
def test_pages_that_the_kernel_does_not_read_are_refused(library: Library, page: Any):
    pages = jnp.zeros((1, 2, 1, 16, 8), page)
    with pytest.raises(jax.errors.JaxRuntimeError, match="takes pages of f32, bf16 and f16"):
        one_token(jnp.zeros((1, 24)), pages, pages, 0)[0].block_until_ready()


@pytest.mark.parametrize("page", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_layer_has_its_own_pages_among_those_of_all(library: Library, page: Any):
    rng = np.random.default_rng(4)
    qkv = jnp.asarray(normal(rng, 1, 24))
    k, v = (jnp.asarray(normal(rng, 3, 2, 1, 16, 8), page) for _ in range(2))
    seen = []
    for layer in range(3):
        alone = one_token(qkv, k[layer : layer + 1], v[layer : layer + 1], 0)
        among = one_token(qkv, k, v, layer)
        seen.append(np.asarray(among[0]))
        np.testing.assert_array_equal(seen[-1], alone[0])
        for made, own, before in zip(among[1:], alone[1:], (k, v), strict=True):
            assert made is not None
            assert own is not None
            assert np.any(np.asarray(made[layer]) != np.asarray(before[layer]))
            want = before.at[layer].set(own[0])
            np.testing.assert_array_equal(np.asarray(made), np.asarray(want))
    assert len({out.tobytes() for out in seen}) == 3


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_there_is_not_is_refused(library: Library, layer: int):
    pages = jnp.zeros((3, 2, 1, 16, 8), jnp.float32)
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="no pages of that"):
        one_token(jnp.zeros((1, 24)), pages, pages, layer)[0].block_until_ready()


def test_many_independent_calls_in_one_program(library: Library):
    """XLA may run them at once, on the very threads that the calls ask for help."""
    rng = np.random.default_rng(2)
    x = normal(rng, 33, 256)
    weights = [packed(normal(rng, 256, 256, dtype=DTYPES[1]))[0] for _ in range(64)]
    library.set_threads(4)
    try:
        run = jax.jit(lambda x, ws: [ops.linear(x, w, 256) for w in ws])
        made = [run(x, weights) for _ in range(5)]
        for i, weight in enumerate(weights):
            want = np.asarray(ops.linear(x, weight, 256))
            for each in made:
                np.testing.assert_array_equal(each[i], want)
    finally:
        library.set_threads(1)


def test_an_unknown_level_is_refused_with_those_there_are():
    code = "from quire.cpu_kernels.library import load; load()"
    environment = os.environ | {VARIABLE: "avx9"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"LookupError: {VARIABLE} must be one of this processor's levels (")
    assert last.endswith("portable) or off, got 'avx9'; unset it to have the best")


@pytest.mark.slow
@pytest.mark.parametrize("place", range(1, 5))
def test_every_level_that_the_processor_has(library: Library, place: int):
    """The tests of the kernels, one level after another."""
    if place >= len(library.levels):
        pytest.skip(f"this processor has {len(library.levels)} levels")
    level = library.levels[place]
    folder = os.path.dirname(__file__)
    files = [
        os.path.join(folder, f"test_{name}.py")
        for name in ("native", "native_top", "paged_attention")
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:randomly", *files]
    done = subprocess.run(
        command, env=os.environ | {VARIABLE: level}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_native_ops_are_chosen_for_both_dtypes(library: Library):
    for dtype in (jnp.bfloat16, jnp.float32):
        assert choose("cpu", dtype=dtype).names() == {
            "paged_attention": "native", "linear": "native",
        }  # fmt: skip
    assert choose("cpu", dtype=jnp.float16).names()["linear"] == "xla"
