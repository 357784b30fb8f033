"""The product kernel for few tokens, compiled for an H200: no spills, and W is read where it is."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from quire.bench.gpu.deviceless import compile_program, h200_devices, spilled_bytes
from quire.layers.mesh import make_mesh
from quire.pallas_kernels.checks import LinearSpec
from quire.pallas_kernels.linear_gpu import Kernel
from quire.pallas_kernels.tuning import load

pytestmark = pytest.mark.gpu_compile

PLAIN, GATED, EXACT = LinearSpec(), LinearSpec(is_gated=True), LinearSpec(is_exact=True)
KERNEL = Kernel(load("h200"))

# [out, in], spec, and whether there are a bias and a residual.
PRODUCTS = {
    "8B, q, k and v": ((6144, 4096), EXACT, True, False),
    "8B, out": ((4096, 4096), PLAIN, False, True),
    "8B, gates and ups": ((28672, 4096), GATED, False, False),
    "8B, down": ((4096, 14336), PLAIN, True, True),
    "8B, head": ((128256, 4096), PLAIN, False, False),
    "8B over 8 devices, q, k and v": ((768, 4096), EXACT, False, False),
    "8B over 8 devices, down": ((4096, 1792), PLAIN, False, False),
    "Qwen2 7B, gates and ups": ((37888, 3584), GATED, True, False),
}


def compiled(kernel: Kernel, name: str, tokens: int, dtype: jnp.dtype) -> object:
    (outputs, inputs), spec, has_bias, has_residual = PRODUCTS[name]
    replicated = NamedSharding(make_mesh(1, h200_devices(1)), PartitionSpec())

    def array(*shape: int, dtype: jnp.dtype = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)

    arguments = (
        array(tokens * 2 if spec.is_exact else tokens, inputs),
        array(outputs, inputs),
        array(outputs) if has_bias else None,
        array(tokens, outputs, dtype=jnp.float32) if has_residual else None,
    )
    assert kernel.serves(tokens, arguments[1], spec)
    return compile_program(jax.jit(lambda *a: kernel.run(*a, spec)).lower(*arguments))


@pytest.mark.parametrize("tokens", [8, 24, 64])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_one_kernel_without_spills_or_copies(
    name: str, tokens: int, capfd: pytest.CaptureFixture[str]
) -> None:
    made = compiled(KERNEL, name, tokens, jnp.dtype(jnp.bfloat16))
    assert spilled_bytes("".join(capfd.readouterr())) == [0]
    assert len(made.kernels) == 1, made.kernels
    assert made.temp_bytes == 0
    assert made.copies_of(PRODUCTS[name][0]) == []


@pytest.mark.parametrize("name", ["8B, out", "8B, gates and ups"])
def test_it_compiles_for_float16_and_for_an_early_launch(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    early = replace(
        KERNEL,
        sizes=replace(KERNEL.sizes, linear=replace(KERNEL.sizes.linear, overlaps_launch=True)),
    )
    for kernel in (KERNEL, early):
        compiled(kernel, name, 8, jnp.dtype(jnp.float16))
        assert spilled_bytes("".join(capfd.readouterr())) == [0]
