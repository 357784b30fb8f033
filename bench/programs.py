"""What starting the 135M shape costs: tracing, loading from the cache, resident memory, idle CPU.

python -m quire.bench.programs [CACHE]: each figure is of an own process; the first fills the cache.
"""

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .report import emit, line

SHAPE = Path(__file__).parent / "shapes" / "135m"
TRACE_TARGET_S = 2.5
MIB = 1 << 20


def measure(cache: str, kv_bytes: int) -> dict[str, Any]:
    """Start the engine once in this process."""
    from quire.engine.config import EngineConfig
    from quire.engine.model_source import DEMO_FOLDER
    from quire.engine.startup import start_engine

    lines: list[str] = []
    started = time.perf_counter()
    engine = start_engine(
        EngineConfig(
            model=str(SHAPE),
            tokenizer=str(DEMO_FOLDER),
            load_format="dummy",
            max_model_len=2048,
            cache_dir=cache,
            kv_cache_memory_bytes=kv_bytes or None,
        ),
        lines.append,
    )
    ready_s = time.perf_counter() - started
    gc.collect()
    status = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    anonymous = int(status["RssAnon"].split()[0]) * 1024
    before = time.process_time()
    time.sleep(2)
    report = next(text for text in lines if "programs in" in text)
    return {
        "ready_s": ready_s,
        "idle_cpu_percent": (time.process_time() - before) / 2 * 100,
        "anonymous_bytes": anonymous,
        "kv_bytes": engine.plan.kv,
        "weight_bytes": engine.plan.weights,
        "report": report,
        "num_pages": engine.plan.num_pages,
    }


def trace(cache: str) -> dict[str, Any]:
    """Trace and lower every program of the shape, with nothing else going on."""
    from quire.engine.compiler import open_cache
    from quire.engine.config import EngineConfig
    from quire.engine.kv_plan import Sizes, plan_kv
    from quire.engine.model_files import open_model
    from quire.engine.model_source import DEMO_FOLDER
    from quire.engine.startup import Builder
    from quire.layers.mesh import make_mesh

    config = EngineConfig(
        model=str(SHAPE), tokenizer=str(DEMO_FOLDER), load_format="dummy", max_model_len=2048
    )
    files, sizes = open_model(config), Sizes.resolve(config)
    build = Builder(config, files, sizes, make_mesh(1))
    folder = open_cache(Path(cache))
    runner = build.runner(plan_kv(config, files, build.layout, sizes, folder, build.kv_budget))
    specs = runner.program_specs()
    gc.disable()  # as compile_all does
    started = time.perf_counter()
    for spec in specs:
        spec.lower()
    return {"seconds": time.perf_counter() - started, "programs": len(specs)}


def child(cache: str, what: str = "--child") -> dict[str, Any]:
    command = [sys.executable, "-m", "quire.bench.programs", cache, what]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    if "--child" in sys.argv:
        print(json.dumps(measure(sys.argv[1], 0)))
        return
    if "--trace" in sys.argv:
        print(json.dumps(trace(sys.argv[1])))
        return
    given = sys.argv[1] if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as temporary:
        cache = given or temporary
        first, second = child(cache), child(cache)
        traces = [child(cache, "--trace") for _ in range(3)]
    words = second["report"].split()
    num_programs, loaded, compiled = int(words[0]), int(words[5]), int(words[7])
    trace_s = statistics.median(t["seconds"] for t in traces)
    emit(line("trace_and_lower_135m", trace_s, "s", TRACE_TARGET_S, programs=num_programs, runs=3))
    emit(line("compiled_on_second_start_135m", compiled, "programs", 0, loaded=loaded))
    emit(line("ready_cold_135m", first["ready_s"], "s", None, report=first["report"]))
    emit(line("ready_warm_135m", second["ready_s"], "s", None, report=second["report"]))
    allowed = second["weight_bytes"] + 400e6 + 1.5e6 * 30 * num_programs
    emit(
        line(
            "resident_anonymous_135m",
            (second["anonymous_bytes"] - second["kv_bytes"]) / MIB,
            "MiB",
            round(allowed / MIB),
            kv_mib=round(second["kv_bytes"] / MIB),
        )
    )
    emit(line("idle_cpu_135m", second["idle_cpu_percent"], "%", 0.5))


if __name__ == "__main__":
    main()
