"""The share of a GPU's memory that jax takes: fixed before jax starts, and what plans count with.

jax takes it whole at its start and hands out from it, so nothing can run out of memory later that
the plan did not see.
"""

import os
from collections.abc import Mapping, MutableMapping, Sequence

import jax

from .errors import MemoryPlanError
from .memory import format_bytes
from .nvml import Gpu, load_nvml, read_gpus

_FRACTION, _PREALLOCATE = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"


def reserve(
    utilization: float,
    num_devices: int,
    gpus: Sequence[Gpu] | None = None,
    environment: MutableMapping[str, str] = os.environ,
) -> list[str]:
    """Have jax take `utilization` of each GPU's memory when it starts. Returns lines to say.

    gpus: as read_gpus gives them, read here if None. Raises MemoryPlanError when one of the first
    num_devices has less than that free, and says who holds the rest.
    """
    if environment.get("JAX_PLATFORMS") == "cpu" or _has_started():
        return []
    gpus = read_gpus(load_nvml(), environment) if gpus is None else gpus
    lines = []
    for gpu in gpus[:num_devices]:
        wanted = int(utilization * gpu.total_bytes)
        who = f"GPU {gpu.index} ({gpu.name}, {format_bytes(gpu.total_bytes)})"
        if wanted > gpu.free_bytes:
            raise MemoryPlanError(
                f"{who} has {format_bytes(gpu.free_bytes)} free{_held(gpu)}, and "
                f"gpu_memory_utilization = {utilization:g} takes {format_bytes(wanted)}; set it to "
                f"at most {_floor(gpu.free_bytes / gpu.total_bytes)}, or end what runs there"
            )
        if gpu.processes:
            lines.append(f"{who} is shared{_held(gpu)}; ours fits beside it")
    fraction = f"{utilization:g}"
    given = environment.get(_FRACTION)
    if gpus and given is not None and given != fraction:
        lines.append(f"{_FRACTION} = {given} is replaced by gpu_memory_utilization = {fraction}")
    environment[_FRACTION], environment[_PREALLOCATE] = fraction, "true"
    return lines


def pool_bytes() -> int:
    """What jax may hand out on each GPU."""
    return int(jax.devices()[0].memory_stats()["bytes_limit"])


def note(utilization: float, environment: Mapping[str, str] = os.environ) -> str | None:
    """What to say when jax has another share, because it started before reserve()."""
    if environment.get(_FRACTION) == f"{utilization:g}":
        return None
    return (
        f"jax was started before quire and has {format_bytes(pool_bytes())} of each GPU; "
        f"gpu_memory_utilization = {utilization:g} takes effect when quire is started first"
    )


def in_use(planned: int) -> str:
    """Plan and actual side by side."""
    stats = jax.devices()[0].memory_stats()
    used, peak = (format_bytes(stats[key]) for key in ("bytes_in_use", "peak_bytes_in_use"))
    return f"in use      {used:>10}  {peak} at most so far; planned {format_bytes(planned)}"


def _has_started() -> bool:
    from jax._src import xla_bridge

    return bool(xla_bridge.backends_are_initialized())


def _held(gpu: Gpu) -> str:
    if not gpu.processes:
        return ""
    parts = [f"process {pid} holds {format_bytes(size)}" for pid, size in gpu.processes.items()]
    return f" ({', '.join(parts)})"


def _floor(share: float) -> str:
    """To two places, never more than the share."""
    return f"{int(share * 100) / 100:g}"
