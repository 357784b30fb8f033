"""Whole steps of the 8B shape for an H200: one graph, everything in place, few kernels a layer."""

from functools import cache

import jax
import numpy as np
import pytest
from quire.bench.gpu.deviceless import Program, compile_program, h200_devices
from quire.bench.gpu.model import kv_plan, make_builder
from quire.engine.lowering import Lowering
from quire.layers.mesh import make_mesh
from quire.layers.programs import Variant

pytestmark = pytest.mark.gpu_compile

NUM_PAGES = 512
MAX_KERNELS = 10  # of a llama layer


@cache
def lowering(num_layers: int, num_devices: int = 1) -> Lowering:
    mesh = make_mesh(num_devices, h200_devices(num_devices))
    builder = make_builder("8b", mesh, num_layers=num_layers, decode_steps=8)
    return builder.runner(kv_plan(NUM_PAGES, 8192)).lowering


@cache
def program(name: str, num_layers: int = 2, num_devices: int = 1) -> Program:
    made = lowering(num_layers, num_devices)
    [spec] = [spec for spec in made.program_specs() if spec.name == name]
    return compile_program(spec.lower(), made.options)


def device_bytes(tree: object) -> int:
    """Of what one device holds."""
    return sum(
        int(np.prod(a.sharding.shard_shape(a.shape))) * a.dtype.itemsize
        for a in jax.tree.leaves(tree)
    )


FORWARD = ["decode[8]", "decode[64]", "forward[64]", "forward[1024]"]


@pytest.mark.parametrize("num_devices", [1, 2, 8])
@pytest.mark.parametrize("name", FORWARD)
def test_a_step_is_one_graph_in_place(name: str, num_devices: int) -> None:
    made, lowered = program(name, 2, num_devices), lowering(2, num_devices)
    assert len(made.graphs) == 1
    assert made.outside_graphs == []
    kv, lengths = lowered._abstract_kv(), lowered._lengths_array()
    assert made.alias_bytes == device_bytes((kv, lengths))
    weights, _ = lowered._weight_arguments()
    for array in jax.tree.leaves((kv, weights)):
        if array.ndim > 1:
            assert made.copies_of(array.sharding.shard_shape(array.shape)) == []


@pytest.mark.parametrize("num_devices", [1, 2, 8])
@pytest.mark.parametrize("name", ["decode[8]", "decode[64]"])
def test_a_layer_of_a_decode_step_has_few_kernels(name: str, num_devices: int) -> None:
    two, four = (program(name, layers, num_devices) for layers in (2, 4))
    added = len(four.kernels) - len(two.kernels)
    assert 0 < added <= 2 * MAX_KERNELS, four.kernels


@pytest.mark.parametrize("num_devices", [2, 8])
@pytest.mark.parametrize("name", ["decode[64]", "forward[1024]"])
def test_a_layer_has_two_all_reduces_and_the_embedding_one(name: str, num_devices: int) -> None:
    assert program(name, 2, num_devices).num_all_reduces == 2 * 2 + 1
    assert program(name, 4, num_devices).num_all_reduces == 2 * 4 + 1


@pytest.mark.parametrize("num_devices", [1, 2, 8])
@pytest.mark.parametrize("variant", Variant)
def test_sampling_is_one_graph_that_sorts_no_vocabulary(variant: Variant, num_devices: int) -> None:
    made, lowered = program(f"sample[64,{variant.value}]", 2, num_devices), lowering(2, num_devices)
    assert len(made.graphs) == 1
    assert made.outside_graphs == []
    assert made.alias_bytes == device_bytes(lowered._abstract_rows())
    for array in jax.tree.leaves(lowered._abstract_rows()):
        if array.ndim > 1:
            assert made.copies_of(array.sharding.shard_shape(array.shape)) == []
    vocab = lowered.vocab // num_devices
    sorts = [line for line in made.hlo.splitlines() if " sort(" in line]
    assert not [line for line in sorts if str(vocab) in line]
    gathered = [line for line in made.hlo.splitlines() if " all-gather" in line]
    assert not [line for line in gathered if str(vocab) in line or str(lowered.vocab) in line]


@pytest.mark.parametrize("variant", Variant)
def test_several_steps_are_one_graph_in_place(variant: Variant) -> None:
    made, lowered = program(f"8 x decode[8][{variant.value}]"), lowering(2)
    assert len(made.graphs) == 1
    assert made.outside_graphs == []
    state = lowered._abstract_kv(), lowered._lengths_array(), lowered._abstract_rows()
    assert made.alias_bytes == device_bytes(state)
    for array in jax.tree.leaves((state[0], state[2])):
        if array.ndim > 1:
            assert made.copies_of(array.shape) == []
