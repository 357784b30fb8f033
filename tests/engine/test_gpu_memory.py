"""What is taken of a GPU, and who else is on it; without a GPU, the driver's library is played."""

import ctypes
from typing import Any

import pytest
from quire.engine import gpu_memory
from quire.engine.errors import MemoryPlanError
from quire.engine.nvml import Gpu, read_gpus

GIB = 1 << 30
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def gpu(free_gib: float = 140, **processes: int) -> Gpu:
    held = {int(pid[1:]): size * GIB for pid, size in processes.items()}
    return Gpu(0, "NVIDIA H200", "GPU-aaaa", 141 * GIB, int(free_gib * GIB), held)


class Driver:
    """Two GPUs; the second one computes for somebody. `failing`: a function that does not work."""

    def __init__(self, failing: str | None = None) -> None:
        self.failing = failing
        self.depth = 0

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == self.failing:
                return 999
            getattr(self, f"on_{name}", lambda *_: None)(*arguments)
            return 0

        return call

    def on_nvmlInit_v2(self) -> None:
        self.depth += 1

    def on_nvmlShutdown(self) -> None:
        self.depth -= 1

    def on_nvmlDeviceGetCount_v2(self, count: Any) -> None:
        count._obj.value = 2

    def on_nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, handle: Any) -> None:
        handle._obj.value = 100 + index.value

    def on_nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> None:
        memory._obj.total, memory._obj.free = 141 * GIB, (241 - handle.value) * GIB

    def on_nvmlDeviceGetName(self, handle: Any, text: Any, size: Any) -> None:
        text.value = b"NVIDIA H200"

    def on_nvmlDeviceGetUUID(self, handle: Any, text: Any, size: Any) -> None:
        text.value = b"GPU-aaaa" if handle.value == 100 else b"GPU-bbbb"

    def on_nvmlDeviceGetComputeRunningProcesses_v3(
        self, handle: Any, count: Any, processes: Any
    ) -> None:
        count._obj.value = handle.value - 100
        processes[0].pid, processes[0].used = 77, GIB


def test_the_driver_is_read() -> None:
    driver = Driver()
    first, second = read_gpus(driver, {})
    assert first == Gpu(0, "NVIDIA H200", "GPU-aaaa", 141 * GIB, 141 * GIB, {})
    assert second == Gpu(1, "NVIDIA H200", "GPU-bbbb", 141 * GIB, 140 * GIB, {77: GIB})
    assert driver.depth == 0


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("0", [0]),
        ("1,0", [1, 0]),
        ("", []),
        ("GPU-b", [1]),
        ("1,7,0", [1]),
        ("GPU-", []),
        ("-1", []),
    ],
)
def test_only_devices_that_cuda_sees_count(listed: str, expected: list[int]) -> None:
    gpus = read_gpus(Driver(), {"CUDA_VISIBLE_DEVICES": listed})
    assert [g.index for g in gpus] == expected


def test_without_a_driver_or_with_a_broken_one_nothing_is_known() -> None:
    assert read_gpus(None, {}) == []
    for name in ("nvmlInit_v2", "nvmlDeviceGetCount_v2", "nvmlDeviceGetMemoryInfo"):
        driver = Driver(name)
        assert read_gpus(driver, {}) == []
        assert driver.depth == 0
    unnamed = read_gpus(Driver("nvmlDeviceGetComputeRunningProcesses_v3"), {})
    assert [g.processes for g in unnamed] == [{}, {}]


@pytest.fixture
def before_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_memory, "_has_started", lambda: False)


@pytest.mark.usefixtures("before_jax")
def test_jax_is_told_its_share_before_it_starts() -> None:
    environment: dict[str, str] = {}
    assert gpu_memory.reserve(0.85, 1, [gpu()], environment) == []
    assert environment == {FRACTION: "0.85", "XLA_PYTHON_CLIENT_PREALLOCATE": "true"}
    assert gpu_memory.note(0.85, environment) is None


@pytest.mark.usefixtures("before_jax")
def test_another_share_in_the_environment_is_replaced_and_said() -> None:
    environment = {FRACTION: ".5"}
    [line] = gpu_memory.reserve(0.9, 1, [gpu()], environment)
    assert line == f"{FRACTION} = .5 is replaced by gpu_memory_utilization = 0.9"
    assert environment[FRACTION] == "0.9"


@pytest.mark.usefixtures("before_jax")
def test_a_process_that_takes_the_place_is_named_with_the_share_that_fits() -> None:
    expected = (
        r"GPU 0 \(NVIDIA H200, 141.00 GiB\) has 100.00 GiB free \(process 41 holds 40.00 GiB\), "
        r"and gpu_memory_utilization = 0.9 takes 126.90 GiB; set it to at most 0.7, or end"
    )
    with pytest.raises(MemoryPlanError, match=expected):
        gpu_memory.reserve(0.9, 1, [gpu(100, p41=40)], {})
    # One that no process owns up to, as in a container, is noticed too.
    with pytest.raises(MemoryPlanError, match=r"has 100.00 GiB free, and"):
        gpu_memory.reserve(0.9, 1, [gpu(100)], {})
    # Beyond the devices that are used nothing matters.
    assert gpu_memory.reserve(0.9, 1, [gpu(), gpu(1)], {}) == []
    with pytest.raises(MemoryPlanError, match="at most 0,"):
        gpu_memory.reserve(0.9, 2, [gpu(), gpu(1)], {})


@pytest.mark.usefixtures("before_jax")
def test_a_process_that_fits_beside_is_said() -> None:
    [line] = gpu_memory.reserve(0.9, 1, [gpu(130, p41=2)], {})
    assert line == (
        "GPU 0 (NVIDIA H200, 141.00 GiB) is shared (process 41 holds 2.00 GiB); ours fits beside it"
    )


def test_nothing_is_touched_on_a_cpu_or_once_jax_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {"JAX_PLATFORMS": "cpu"}
    assert gpu_memory.reserve(0.9, 1, [gpu(1)], environment) == []
    assert FRACTION not in environment
    monkeypatch.setattr(gpu_memory, "_has_started", lambda: True)
    assert gpu_memory.reserve(0.9, 1, [gpu(1)], environment := {}) == []
    assert environment == {}


def test_a_share_that_came_too_late_and_what_is_in_use_are_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Device:
        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 105 * GIB, "bytes_in_use": GIB, "peak_bytes_in_use": 2 * GIB}

    monkeypatch.setattr(gpu_memory.jax, "devices", lambda: [Device()])
    assert gpu_memory.pool_bytes() == 105 * GIB
    late = gpu_memory.note(0.9, {})
    assert late is not None
    assert "jax was started before quire and has 105.00 GiB of each GPU" in late
    expected = "in use        1.00 GiB  2.00 GiB at most so far; planned 3.00 GiB"
    assert gpu_memory.in_use(3 * GIB) == expected


def test_jax_says_whether_it_has_started() -> None:
    import jax

    jax.devices()
    assert gpu_memory._has_started()
