"""What the cache of packed weights saves a start: seconds, processor time, and peak memory.

python -m quire.bench.weights [135m|1b]: the checkpoint of bench/peers/setup.sh. Each start is a
process of its own; those that pack and those that read the cache take turns, with all programs
compiled.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .report import PEERS_ROOT, emit, line

RUNS = 3
READY_TARGET_S = 10  # "in seconds", of the 1.2B shape
PACKED, CACHED, CACHE_BYTES = "packed", "cached", 20 << 30
MIB = 1 << 20


def start(model: str, cache: str, cache_bytes: int) -> dict[str, Any]:
    """Start the engine once in this process."""
    from quire.engine.config import EngineConfig
    from quire.engine.startup import start_engine

    lines: list[str] = []
    started = time.perf_counter()
    config = EngineConfig(
        model=model,
        cache_dir=cache,
        kv_cache_memory_bytes=64 * MIB,
        weight_cache_bytes=cache_bytes,
    )
    engine = start_engine(config, lines.append)
    ready_s = time.perf_counter() - started
    status = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    return {
        "ready_s": ready_s,
        "processor_s": time.process_time(),
        "peak_mib": int(status["VmHWM"].split()[0]) / 1024,
        "weights_mib": engine.plan.weights / MIB,
        "said": next(text for text in lines if text.startswith("weights in ")),
    }


def in_process(model: str, cache: str, cache_bytes: int) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "quire.bench.weights", "--start", model, cache, str(cache_bytes)
    ]  # fmt: skip
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    if sys.argv[1:2] == ["--start"]:
        model, cache, cache_bytes = sys.argv[2:]
        print(json.dumps(start(model, cache, int(cache_bytes))))
        return
    size = sys.argv[1] if len(sys.argv) > 1 else "1b"
    model = str(PEERS_ROOT / "models" / size)
    with tempfile.TemporaryDirectory() as cache:
        first = in_process(model, cache, CACHE_BYTES)
        emit(line(f"weights_{size}_first_start", first["ready_s"], "s", None, **first))
        found: dict[str, list[dict[str, Any]]] = {PACKED: [], CACHED: []}
        for _ in range(RUNS):
            found[PACKED].append(in_process(model, cache, 0))
            found[CACHED].append(in_process(model, cache, CACHE_BYTES))
    for what, results in found.items():
        assert all(("cache" in one["said"]) == (what is CACHED) for one in results), results
        medians = {
            key: statistics.median(one[key] for one in results)
            for key in ("ready_s", "processor_s", "peak_mib", "weights_mib")
        }
        loading_s = [float(one["said"].split()[2]) for one in results]
        name = f"weights_{size}_{what}"
        target = READY_TARGET_S if what is CACHED else None
        emit(line(name, statistics.median(loading_s), "s", None, runs=RUNS))
        emit(line(f"{name}_ready", medians["ready_s"], "s", target, **medians))


if __name__ == "__main__":
    main()
