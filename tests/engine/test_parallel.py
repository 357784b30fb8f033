"""Which numbers of devices can share a model: what is refused, and what would do."""

import jax
import pytest
from quire.engine.errors import ConfigError
from quire.engine.parallel import open_mesh, require_divisible
from quire.layers.kv_pages import abstract_pages, page_bytes, plan_layout
from quire.layers.mesh import MODEL
from quire.layers.models.llama import Decoder, DecoderSpec
from quire.layers.rope import RopeConfig


def decoder(heads: int, kv_heads: int, mlp_size: int) -> Decoder:
    rope = RopeConfig("default", 1e4, 8, 64)
    return Decoder(DecoderSpec(64, 16, mlp_size, heads, kv_heads, 8, 1e-6, rope, True, (None,)))


@pytest.mark.parametrize(
    ("model", "size", "rest"),
    [
        ((32, 8, 96), 3, "does not divide num_attention_heads = 32; use 1, 2, 4 or 8"),
        ((32, 8, 100), 8, "does not divide intermediate_size = 100; use 1, 2 or 4"),
        (
            (24, 3, 96),
            2,
            "is neither a divisor nor a multiple of num_key_value_heads = 3; use 1, 3 or 6",
        ),
        ((7, 7, 7), 2, "does not divide num_attention_heads = 7; use 1 or 7"),
        ((1, 1, 5), 4, "does not divide num_attention_heads = 1; use 1"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(
    model: tuple[int, int, int], size: int, rest: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        require_divisible(decoder(*model), size)
    assert str(caught.value) == f"tensor_parallel_size = {size} {rest}"


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32])
def test_fewer_kv_heads_than_devices_are_no_reason(size: int) -> None:
    require_divisible(decoder(32, 2, 64), size)


def test_more_devices_than_there_are_is_refused() -> None:
    (device,) = jax.devices()
    with pytest.raises(ConfigError) as caught:
        open_mesh(8)
    assert str(caught.value) == (
        "tensor_parallel_size = 8 needs as many devices and there is 1 (cpu); use at most 1, or "
        "start with XLA_FLAGS=--xla_force_host_platform_device_count=8, which is for tests: it "
        "makes nothing faster"
    )
    assert open_mesh(1).shape[MODEL] == 1
    assert open_mesh(1).devices.flat[0] == device


@pytest.mark.parametrize(("size", "heads"), [(1, 2), (2, 2), (4, 4), (8, 8)])
def test_pages_have_a_head_for_each_device(size: int, heads: int) -> None:
    layout = plan_layout(decoder(32, 2, 64).kv_specs(), size)
    (pages,) = abstract_pages(layout, 5, 16, jax.numpy.dtype("float32"))
    assert pages.k.shape == pages.v.shape == (5, heads, 16, 8)
    local = 2 * pages.k.size * 4 // 5 // size  # keys and values of one page
    assert page_bytes(layout, 16, jax.numpy.dtype("float32")) == local
