"""The ceilings of this machine, which other figures are quoted against: reading memory, matmuls.

python -m quire.bench.roofline

Reading: all cores sum 1 GiB. Matmuls: the best of a few shapes, by XLA and, where
bench/peers/setup.sh installed it, by torch.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .report import PEERS_ROOT, emit, line, num_cores

GIB = 1 << 30
READ_RUNS, MATMUL_RUNS = 7, 5
# (rows, in, out)
SHAPES = ((512, 2048, 2048), (1024, 2048, 2048), (1024, 4096, 4096), (2048, 4096, 4096))
PEERS_FOLDER = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Ceilings:
    """Of this machine, now: it is shared, and its speed changes by the minute."""

    bandwidth: float  # bytes per second, read by all cores
    flops: float  # of the best bfloat16 matmul, XLA's or torch's
    torch_products: float | None  # seconds, as torch_products below


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
    """Bytes per second: each core sums its part. numpy's sum is the fastest reader found, and lets
    the other threads run; memchr stays a third below it, and below what quire itself reads.
    """
    block = np.ones(GIB // 4, np.float32)
    parts = np.array_split(block, num_cores())
    with ThreadPoolExecutor(len(parts)) as pool:
        seconds = best_seconds(lambda: list(pool.map(np.sum, parts)), READ_RUNS)
    return block.nbytes / seconds


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


def torch_matmul(dtype: str) -> dict[str, Any] | None:
    """flops, shape and version; None where the peers are not installed."""
    return _by_torch("torch_matmul.py", dtype, json.dumps(SHAPES), str(MATMUL_RUNS))


def torch_products(model: Path, rows: int) -> float | None:
    """Seconds that torch takes for the matmuls of a model's layers alone, each weight's own: no
    norms, no attention, nothing between them. None where the peers are not installed.
    """
    found = _by_torch("torch_products.py", str(model), str(rows), str(MATMUL_RUNS))
    return None if found is None else found["seconds"]


def ceilings(model: Path, rows: int) -> Ceilings:
    flops, _ = xla_matmul("bfloat16")
    if (by_torch := torch_matmul("bfloat16")) is not None:
        flops = max(flops, by_torch["flops"])
    return Ceilings(read_bandwidth(), flops, torch_products(model, rows))


def _by_torch(script: str, *arguments: str) -> dict[str, Any] | None:
    python = PEERS_ROOT / "vllm/bin/python"
    if not python.exists():
        return None
    command = [str(python), str(PEERS_FOLDER / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:  # a ceiling less, and what was measured before it stands
        print(f"{script} failed:\n{done.stderr}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    emit(line("read_bandwidth_1gib", read_bandwidth() / 1e9, "GB/s", None, runs=READ_RUNS))
    for dtype in ("bfloat16", "float32"):
        flops, shape = xla_matmul(dtype)
        emit(line(f"matmul_xla_{dtype}", flops / 1e9, "GFLOP/s", None, shape=shape))
        found = torch_matmul(dtype)
        if found is None:
            print("no torch to ask: see bench/peers/setup.sh", file=sys.stderr)
            continue
        more = {"shape": found["shape"], "torch": found["version"]}
        emit(line(f"matmul_torch_{dtype}", found["flops"] / 1e9, "GFLOP/s", None, **more))


if __name__ == "__main__":
    main()
