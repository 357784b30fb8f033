"""The ceilings of this machine, which other figures are quoted against: reading memory, matmuls.

python -m quire.bench.roofline

Reading: all cores look for a byte that is not there in 1 GiB. Matmuls: the best of a few shapes, by
XLA and, where bench/peers/setup.sh installed it, by torch.
"""

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .report import PEERS_ROOT, emit, line, num_cores

GIB = 1 << 30
READ_RUNS, MATMUL_RUNS = 7, 5
# (rows, in, out)
SHAPES = ((512, 2048, 2048), (1024, 2048, 2048), (1024, 4096, 4096), (2048, 4096, 4096))
TORCH_SCRIPT = Path(__file__).parent / "peers" / "torch_matmul.py"


def best_seconds(run: Callable[[], object], runs: int) -> float:
    """The shortest of several runs after a warm-up: a ceiling, not a typical time."""
    run()
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def read_bandwidth() -> float:
    """Bytes per second. memchr reads every byte with the widest loads that the processor has, and
    ctypes lets the other threads run.
    """
    find = ctypes.CDLL(None).memchr
    find.argtypes, find.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p
    block = np.ones(GIB, np.uint8)
    threads = num_cores()
    size = GIB // threads

    def read(part: int) -> None:
        if find(block.ctypes.data + part * size, 0, size) is not None:
            raise AssertionError("there is no such byte")

    with ThreadPoolExecutor(threads) as pool:
        seconds = best_seconds(lambda: list(pool.map(read, range(threads))), READ_RUNS)
    return size * threads / seconds


def xla_matmul(dtype: str) -> tuple[float, tuple[int, int, int]]:
    """The best FLOP/s, and for which shape. Accumulates in f32, as the engine does."""
    import jax
    import jax.numpy as jnp

    best = (0.0, SHAPES[0])
    for rows, width, out in SHAPES:
        a, b = (jnp.ones(shape, dtype) for shape in ((rows, width), (width, out)))
        dot = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
        seconds = best_seconds(lambda: dot(a, b).block_until_ready(), MATMUL_RUNS)  # noqa: B023
        best = max(best, (2 * rows * width * out / seconds, (rows, width, out)))
    return best


def torch_matmul(dtype: str) -> dict[str, object] | None:
    """flops, shape and version; None where the peers are not installed."""
    python = PEERS_ROOT / "vllm/bin/python"
    if not python.exists():
        return None
    command = [str(python), str(TORCH_SCRIPT), dtype, json.dumps(SHAPES), str(MATMUL_RUNS)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, object] = json.loads(out.splitlines()[-1])
    return found


def main() -> None:
    emit(line("read_bandwidth_1gib", read_bandwidth() / 1e9, "GB/s", None, runs=READ_RUNS))
    for dtype in ("bfloat16", "float32"):
        flops, shape = xla_matmul(dtype)
        emit(line(f"matmul_xla_{dtype}", flops / 1e9, "GFLOP/s", None, shape=shape))
        found = torch_matmul(dtype)
        if found is None:
            print("torch is not installed: run bench/peers/setup.sh", file=sys.stderr)
            continue
        rate, shape, version = found["flops"], found["shape"], found["version"]
        assert isinstance(rate, float)
        name = f"matmul_torch_{dtype}"
        emit(line(name, rate / 1e9, "GFLOP/s", None, shape=shape, torch=version))


if __name__ == "__main__":
    main()
