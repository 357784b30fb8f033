"""What the NVIDIA driver says of its GPUs, by its management library; nothing of JAX or CUDA."""

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"
_MOST_PROCESSES = 64
_TEXT_BYTES = 96


@dataclass(frozen=True)
class Gpu:
    """index: the driver's. processes: process id -> bytes, of those that compute on it."""

    index: int
    name: str
    uuid: str
    total_bytes: int
    free_bytes: int
    processes: dict[int, int]


class _Memory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong),
    )  # fmt: skip


class _Process(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint), ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint), ("compute_instance", ctypes.c_uint),
    )  # fmt: skip


def load_nvml() -> Any | None:
    """The driver's library; None where there is no driver."""
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError:
        return None


def read_gpus(nvml: Any | None, environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; none where the driver fails."""
    if nvml is None or nvml.nvmlInit_v2() != 0:
        return []
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return []
        found = [_read(nvml, index) for index in range(count.value)]
    finally:
        nvml.nvmlShutdown()
    return _visible([gpu for gpu in found if gpu is not None], environment)


def _read(nvml: Any, index: int) -> Gpu | None:
    handle, memory = ctypes.c_void_p(), _Memory()
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
        return None
    if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
        return None
    name, uuid = (ctypes.create_string_buffer(_TEXT_BYTES) for _ in range(2))
    nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(_TEXT_BYTES))
    nvml.nvmlDeviceGetUUID(handle, uuid, ctypes.c_uint(_TEXT_BYTES))
    count, processes = ctypes.c_uint(_MOST_PROCESSES), (_Process * _MOST_PROCESSES)()
    query = nvml.nvmlDeviceGetComputeRunningProcesses_v3
    if query(handle, ctypes.byref(count), processes) != 0:
        count.value = 0
    held = {p.pid: p.used for p in processes[: count.value]}
    return Gpu(index, name.value.decode(), uuid.value.decode(), memory.total, memory.free, held)


def _visible(gpus: list[Gpu], environment: Mapping[str, str]) -> list[Gpu]:
    """CUDA reads the list up to the first entry that is no device."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return gpus
    chosen = []
    for entry in listed.split(","):
        name = entry.strip()
        fitting = [
            gpu for gpu in gpus if name == str(gpu.index) or (name and gpu.uuid.startswith(name))
        ]
        if len(fitting) != 1:
            break
        chosen += fitting
    return chosen
