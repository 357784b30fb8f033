"""`quire bench startup`: seconds until an engine is ready, each time in a process of its own.

Cold: an empty compile cache that is thrown away. Warm: the cache of the configuration.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ...engine.errors import ConfigError, EngineError
from .figures import percentiles, write_json


@dataclass(frozen=True)
class Start:
    """One start, in seconds. loaded and compiled count programs."""

    startup: float
    compilation: float
    loaded: int
    compiled: int


def run(arguments: argparse.Namespace, options: dict[str, Any]) -> int:
    """Measure and print; the exit code."""
    cold = []
    for _ in range(arguments.num_iters_cold):
        with tempfile.TemporaryDirectory(prefix="quire-bench-") as cache:
            cold.append(_start(options | {"cache_dir": cache}))
    for _ in range(arguments.num_iters_warmup):
        _start(options)
    warm = [_start(options) for _ in range(arguments.num_iters_warm)]
    figures: dict[str, Any] = {}
    for phase, starts in (("cold", cold), ("warm", warm)):
        if not starts:
            continue
        print(f"{phase.upper()} STARTUP:")
        last = starts[-1]
        print(f"  programs: {last.loaded} loaded, {last.compiled} compiled")
        for kind in ("startup", "compilation"):
            times = [getattr(start, kind) for start in starts]
            print(f"  Avg {kind} time: {fmean(times):.2f} seconds")
            figures |= {
                f"avg_{phase}_{kind}_time": fmean(times),
                f"{phase}_{kind}_times": times,
                f"{phase}_{kind}_percentiles": percentiles(times),
            }
    write_json(arguments.output_json, figures)
    return 0


def _start(options: dict[str, Any]) -> Start:
    """Raises ConfigError or EngineError with what the process said."""
    done = subprocess.run(
        [sys.executable, "-m", "quire.serving.bench.one_start", json.dumps(options)],
        env=os.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1].removeprefix("quire: ")
        if done.returncode == 2:
            raise ConfigError(said)
        raise EngineError(f"a start ended with exit code {done.returncode}: {said}")
    return Start(**json.loads(done.stdout.splitlines()[-1]))
