"""The product kernel for few tokens on GPUs, without one: interpreted with race detection against
its reference, lowered for CUDA, and that a row's bits depend on nothing but the row.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quire.pallas_kernels import reference
from quire.pallas_kernels.checks import ContractError, LinearSpec
from quire.pallas_kernels.linear_gpu import (
    Kernel,
    Problem,
    Tiling,
    choose_tiling,
)
from quire.pallas_kernels.tuning import Sizes, load

H200 = load("h200")
PLAIN, GATED, EXACT = LinearSpec(), LinearSpec(is_gated=True), LinearSpec(is_exact=True)


@dataclass(frozen=True)
class Case:
    """One product. sms: of the device; few of them make a block walk over several tiles."""

    tokens: int
    inputs: int
    outputs: int
    spec: LinearSpec = PLAIN
    has_bias: bool = False
    has_residual: bool = False
    dtype: Any = jnp.bfloat16
    sms: int = 3

    def kernel(self, sizes: Sizes = H200) -> Kernel:
        return Kernel(replace(sizes, num_sms=self.sms), is_interpreted=True)

    def arrays(self) -> tuple[Any, ...]:
        """x, w, bias, residual: dtypes of a layer, sums of about 1."""
        rng = np.random.default_rng(self.tokens * self.outputs)

        def normal(*shape: int, dtype: Any = self.dtype) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

        x = normal(self.tokens, self.inputs, dtype=jnp.float32)
        high = x.astype(self.dtype)
        rest = (x - high.astype(jnp.float32)).astype(self.dtype)
        return (
            jnp.concatenate([high, rest]) if self.spec.is_exact else high,
            normal(self.outputs, self.inputs) / np.sqrt(self.inputs).astype(self.dtype),
            normal(self.outputs) if self.has_bias else None,
            normal(self.tokens, self.outputs, dtype=jnp.float32) if self.has_residual else None,
        )


CASES = {
    "plain": Case(8, 256, 128),
    "one token": Case(1, 128, 64),
    "many stages of 64 columns": Case(9, 1344, 48, sms=1),
    "several tiles of a block": Case(16, 192, 1040, sms=2),
    "residual": Case(5, 128, 96, has_residual=True),
    "residual and several tiles": Case(8, 128, 1040, has_bias=True, has_residual=True, sms=2),
    "bias": Case(3, 128, 48, has_bias=True, dtype=jnp.float16),
    "gated": Case(8, 128, 224, GATED),
    "gated with bias, float16": Case(20, 192, 608, GATED, has_bias=True, dtype=jnp.float16),
    "exact": Case(6, 128, 96, EXACT),
    "exact with bias, two halves of 64 rows": Case(40, 128, 64, EXACT, has_bias=True),
    "most tokens": Case(64, 128, 96, has_residual=True),
    "pairs of blocks": Case(64, 1344, 96, has_residual=True, sms=2),
    "pairs with several tiles, gated": Case(32, 384, 1024, GATED, sms=2),
    "pairs, exact": Case(48, 1280, 96, EXACT, sms=3),
}


@pytest.fixture(autouse=True)
def _fresh_interpreter() -> Iterator[None]:
    yield
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import gpu_callbacks

    gpu_callbacks.reset_gpu_interpret_mode_state()


def tiling(case: Case) -> Tiling:
    tokens = -(-case.tokens // 8) * 8
    made = choose_tiling(Problem(tokens, case.inputs, case.outputs, case.spec), case.kernel().sizes)
    assert made is not None
    return made


def run(case: Case, arrays: tuple[Any, ...], sizes: Sizes = H200) -> np.ndarray:
    return np.asarray(jax.jit(lambda *a: case.kernel(sizes).run(*a, case.spec))(*arrays))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_interpreted_kernel_agrees_with_the_reference_and_has_no_races(case: Case) -> None:
    """The interpreter raises when it sees a race."""
    arrays = case.arrays()
    assert case.kernel().serves(case.tokens, arrays[1], case.spec)
    made = run(case, arrays)
    wanted = np.asarray(reference.linear(*arrays, case.spec))
    assert made.shape == wanted.shape
    assert made.dtype == wanted.dtype
    # Sums of some hundred products in float32; a gated result is rounded to 16 bits.
    tolerance = 1e-5 if not case.spec.is_gated else 2**-8
    np.testing.assert_allclose(
        made.astype(np.float32), wanted.astype(np.float32), rtol=tolerance, atol=1e-5
    )


def test_the_cases_are_what_they_are_called() -> None:
    for name, case in CASES.items():
        made = tiling(case)
        if "pairs" in name:
            assert made.is_paired, name
        if "several tiles" in name:
            assert made.tiles > made.blocks, name
        if "stages" in name or "pairs" in name:  # a stage is used again
            assert case.inputs // made.columns * (made.tiles // made.blocks) > made.stages, name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_lowers_for_cuda(case: Case) -> None:
    """The interpreter takes what the compiler does not."""
    kernel = replace(case.kernel(), is_interpreted=False)
    traced = jax.jit(lambda *a: kernel.run(*a, case.spec)).trace(*case.arrays())
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("case", ["residual", "gated", "exact"])
def test_rows_depend_on_nothing_but_themselves(case: str) -> None:
    """The same bits with other rows beside it, with fewer or more of them, and in other tiles."""
    few, many = replace(CASES[case], tokens=3), replace(CASES[case], tokens=32, sms=2)
    x, w, bias, residual = many.arrays()
    parts = x.reshape(-1, 32, few.inputs)
    assert tiling(many) != tiling(few)
    whole = run(many, (x, w, bias, residual))
    for rows in ([0, 1, 2], [31, 4, 0], [7]):
        at = np.array(rows)
        of_rows = (parts[:, at].reshape(-1, few.inputs), w, bias)
        made = run(few, (*of_rows, None if residual is None else residual[at]))
        np.testing.assert_array_equal(made, whole[at])


# [out, in] of the products of published models, and the blocks that share them on 132 SMs.
PUBLISHED = {
    "Llama 8B, q, k and v": ((6144, 4096), EXACT, 48, 128),
    "Llama 8B, out": ((4096, 4096), PLAIN, 32, 128),
    "Llama 8B, gates and ups": ((28672, 4096), GATED, 112, 128),
    "Llama 8B, down": ((4096, 14336), PLAIN, 32, 128),
    "Llama 8B, head": ((128256, 4096), PLAIN, 128, 132),
    "Llama 1B, out": ((2048, 2048), PLAIN, 16, 128),
    "Qwen2 7B, gates and ups": ((37888, 3584), GATED, 16, 132),
    "Qwen3 8B, head": ((151936, 4096), PLAIN, 128, 132),
    "Llama 70B over 8 devices, out": ((8192, 1024), PLAIN, 64, 128),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_tiles_keep_the_device_busy(name: str) -> None:
    (outputs, inputs), spec, rows, blocks = PUBLISHED[name]
    problem = Problem(8, inputs, outputs, spec)
    tiling = choose_tiling(problem, H200)
    assert tiling is not None
    assert (tiling.rows, tiling.blocks) == (rows, blocks)
    # All of W at once in flight if it is little, else what hides the way to memory and back.
    in_flight = (tiling.stages - 1) * tiling.columns * tiling.rows * (2 if spec.is_gated else 1) * 2
    assert in_flight >= min(rows * inputs * 2, 32 * 1024), tiling


def test_serves_says_no_to_what_the_kernel_cannot_do() -> None:
    w = jax.ShapeDtypeStruct((96, 128), jnp.bfloat16)
    kernel = Kernel(H200)
    assert kernel.serves(64, w, PLAIN)
    for tokens, shape, dtype, spec in [
        (65, (96, 128), jnp.bfloat16, PLAIN),  # too many tokens
        (0, (96, 128), jnp.bfloat16, PLAIN),
        (8, (96, 128), jnp.float32, PLAIN),
        (8, (96, 96), jnp.bfloat16, PLAIN),  # columns that fill no swizzled tile
        (8, (100, 128), jnp.bfloat16, PLAIN),  # rows that fill no transfer
        (8, (48, 128), jnp.bfloat16, GATED),
    ]:
        assert not kernel.serves(tokens, jax.ShapeDtypeStruct(shape, dtype), spec), shape


def test_arguments_that_do_not_fit_are_named() -> None:
    x, w, _, _ = CASES["plain"].arrays()
    kernel = Kernel(H200)
    with pytest.raises(ContractError, match=r"residual must be f32\[8, 128\], got float32\(4, 128"):
        kernel.run(x, w, None, jnp.zeros((4, 128)), PLAIN)
    with pytest.raises(ContractError, match=r"bias must be \[128\], got \(64,\)"):
        kernel.run(x, w, jnp.zeros(64), None, PLAIN)
    with pytest.raises(ContractError, match=r"x must be \[2 \* tokens, in\] where it is exact"):
        kernel.run(x[:7], w, None, None, EXACT)
    with pytest.raises(ContractError, match=r"a gated product has an even number of outputs"):
        kernel.run(x, w, None, jnp.zeros((8, 64)), GATED)
    with pytest.raises(ContractError, match="must fit, got bfloat16"):
        kernel.run(x[:, :64], w, None, None, PLAIN)
