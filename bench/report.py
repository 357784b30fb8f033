"""One bench line: what was measured, on what, against which target."""

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Where bench/peers/setup.sh puts the other engines and the checkpoints.
PEERS_ROOT = Path(os.environ.get("QUIRE_PEERS", Path.home() / ".cache" / "quire-peers"))


def line(
    name: str,
    value: float,
    unit: str,
    target: float | None,
    *,
    is_least: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """The record of one figure. target: the most it may be, or the least; None if there is none."""
    record: dict[str, Any] = {"name": name, "value": round(value, 4), "unit": unit}
    if target is not None:
        is_met = value >= target if is_least else value <= target
        record |= {"target": f"{'>=' if is_least else '<='} {target:g}", "met": is_met}
    packages = ("quire", "jax", "jaxlib", "numpy")
    return record | {
        **more,
        "command": " ".join(["python -m", *sys.orig_argv[2:]]),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "machine": {
            "processor": processor(),
            "cores": num_cores(),
            "load_average": round(os.getloadavg()[0], 2),
        },
    }


def emit(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


def num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def processor() -> str:
    for text in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if text.startswith("model name"):
            return text.partition(":")[2].strip()
    return platform.processor()
