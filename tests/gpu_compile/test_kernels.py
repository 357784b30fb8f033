"""The attention kernels compiled for an H200: no register is spilled, the cache is never copied."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from quire.bench.gpu.deviceless import Program, compile_program, h200_devices, spilled_bytes
from quire.pallas_kernels.attention_gpu import HOPPER
from quire.pallas_kernels.heads import HeadNorms

from ..kernels.gpu_cases import COMPILED, on_device, shapes_of

pytestmark = pytest.mark.gpu_compile


@cache
def compiled(name: str) -> tuple[Program, Any]:
    case = COMPILED[name]
    mesh = jax.sharding.Mesh(h200_devices(1), ("x",))
    arguments = shapes_of(case, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    lowered = jax.jit(on_device(case), donate_argnums=3).lower(*arguments)
    return compile_program(lowered), arguments[3]


@pytest.mark.parametrize("name", COMPILED)
def test_no_register_is_spilled(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    compiled(name)
    printed = capfd.readouterr()
    spills = spilled_bytes(printed.out + printed.err)
    # Of units, the sum of their parts, and items: those that no case before has compiled already.
    assert len(spills) == 3 or name != next(iter(COMPILED))
    assert not any(spills)


def test_the_kernel_of_heads_spills_nothing_and_writes_in_place(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The 8B shape with norms: everything that the kernel does."""
    case = COMPILED["8b"]
    sharding = jax.sharding.SingleDeviceSharding(h200_devices(1)[0])
    q, _, _, kv, batch, _ = shapes_of(case, sharding)
    columns = (case.heads + 2 * case.kv_heads) * case.head_dim

    def f32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    def call(qkv: Any, kv: Any, batch: Any, tables: Any, norms: Any) -> Any:
        plan = HOPPER.plan(batch, case.page_size, case.heads // case.kv_heads)
        return HOPPER.attend(qkv, kv, batch, plan, case.spec, tables, norms, None)

    table, norm = f32(case.tokens, case.head_dim), f32(case.head_dim)
    arguments = (f32(q.shape[0], columns), kv, batch, (table, table), HeadNorms(norm, norm))
    program = compile_program(jax.jit(call, donate_argnums=1).lower(*arguments))
    printed = capfd.readouterr()
    spills = spilled_bytes(printed.out + printed.err)
    assert spills
    assert max(spills) == 0
    assert program.alias_bytes == sum(pages.size * pages.dtype.itemsize for pages in kv)
    assert program.copies_of(kv.k.shape) == []


@pytest.mark.parametrize("name", COMPILED)
def test_the_cache_is_written_in_place(name: str) -> None:
    program, kv = compiled(name)
    size = sum(pages.size * pages.dtype.itemsize for pages in kv)
    assert program.alias_bytes == size
    for pages in kv:
        assert program.copies_of(pages.shape) == []
