"""The attention kernels compiled for an H200: no register is spilled, the cache is never copied."""

from functools import cache
from typing import Any

import jax
import pytest
from quire.bench.gpu.deviceless import Program, compile_program, h200_devices, spilled_bytes

from ..kernels.gpu_cases import COMPILED, on_device, shapes_of

pytestmark = pytest.mark.gpu_compile

# Kernels that spill a little, outside the loop over tiles: bytes stored and loaded, at most.
SPILLS = {"widest": 128, "256": 128}


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
    assert max(spills, default=0) <= SPILLS.get(name, 0)


@pytest.mark.parametrize("name", COMPILED)
def test_the_cache_is_written_in_place(name: str) -> None:
    program, kv = compiled(name)
    size = sum(pages.size * pages.dtype.itemsize for pages in kv)
    assert program.alias_bytes == size
    for pages in kv:
        assert program.copies_of(pages.shape) == []
