"""Which devices share a model, and whether it can be divided among them."""

from collections.abc import Iterable

import jax
from jax.sharding import Mesh

from ..layers.mesh import make_mesh
from ..layers.models.llama import Decoder
from .errors import ConfigError

# Sizes up to this are named when the one asked for does not do: the devices of one machine.
_MOST_NAMED = 8


def open_mesh(tensor_parallel_size: int) -> Mesh:
    """The mesh over the first devices. Raises ConfigError when there are fewer."""
    devices = jax.devices()
    if tensor_parallel_size > len(devices):
        there = "is 1" if len(devices) == 1 else f"are {len(devices)}"
        way_out = f"use at most {len(devices)}"
        if devices[0].platform == "cpu":
            way_out += (
                ", or start with XLA_FLAGS=--xla_force_host_platform_device_count="
                f"{tensor_parallel_size}, which is for tests: it makes nothing faster"
            )
        raise ConfigError(
            f"tensor_parallel_size = {tensor_parallel_size} needs as many devices and there "
            f"{there} ({devices[0].platform}); {way_out}"
        )
    return make_mesh(tensor_parallel_size, devices)


def require_divisible(model: Decoder, num_shards: int) -> None:
    """Raise ConfigError unless a model can be divided; names the sizes that would do."""
    reason = _refusal(model, num_shards)
    if reason is not None:
        fitting = [n for n in range(1, _MOST_NAMED + 1) if _refusal(model, n) is None]
        raise ConfigError(f"tensor_parallel_size = {num_shards} {reason}; use {_either(fitting)}")


def _refusal(model: Decoder, num_shards: int) -> str | None:
    for name, count in model.divided().items():
        if count % num_shards:
            return f"does not divide {name} = {count}"
    for kv_heads in {spec.num_kv_heads for spec in model.kv_specs()}:
        if kv_heads % num_shards and num_shards % kv_heads:
            return f"is neither a divisor nor a multiple of num_key_value_heads = {kv_heads}"
    return None


def _either(sizes: Iterable[int]) -> str:
    *most, last = map(str, sizes)
    return f"{', '.join(most)} or {last}" if most else last
