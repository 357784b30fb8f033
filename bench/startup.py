"""How long `quire generate` of 16 tokens takes as a whole process, cache empty and full.

python -m quire.bench.startup
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time

from .report import emit, line

COLD_TARGET_S, WARM_TARGET_S = 25, 5
WARM_RUNS = 3


def run(cache: str) -> float:
    """Wall seconds of one process."""
    command = [
        sys.executable, "-m", "quire.bench.one_generate",
        "generate", "--prompt", "Hello", "--max-tokens", "16", "--ignore-eos", "--temperature", "0",
    ]  # fmt: skip
    environment = os.environ | {"QUIRE_CACHE_DIR": cache}
    started = time.perf_counter()
    subprocess.run(command, check=True, env=environment, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.chmod(cache, 0o700)
        emit(line("startup_cold", run(cache), "s", COLD_TARGET_S))
        warm = [run(cache) for _ in range(WARM_RUNS)]
        emit(line("startup_warm", statistics.median(warm), "s", WARM_TARGET_S, runs=WARM_RUNS))


if __name__ == "__main__":
    main()
