"""What a run of the GPU bench found: one JSON file and one log."""

import json
import platform
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "numpy", "transformers",
)  # fmt: skip


class Results:
    """Lines of figures as they come, in a file that is whole after each section."""

    def __init__(self, folder: Path, *, device: str, measured: bool, seconds: float) -> None:
        """seconds: from now on; a section that would begin later is left out, and said."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "gpu.json"
        self._log_path = folder / "gpu.log"
        self._log_path.write_text("", encoding="utf-8")
        self._ends = time.monotonic() + seconds
        self._head = {
            "device": device,
            "measured": measured,
            "command": _command(),
            "versions": {"python": platform.python_version()} | _versions(),
        }
        self.measured = measured
        self.lines: list[dict[str, Any]] = []
        self.num_failed = 0

    def say(self, text: str) -> None:
        stamped = f"{time.strftime('%H:%M:%S')} {text}"
        print(stamped, flush=True)
        with self._log_path.open("a", encoding="utf-8") as log:
            print(stamped, file=log)

    def add(
        self,
        name: str,
        value: float | None,
        unit: str,
        *,
        least: float | None = None,
        most: float | None = None,
        **more: Any,
    ) -> None:
        """One figure; least, most: its target. value None: compiled only."""
        value = None if value is None else float(value)  # numpy's too
        line: dict[str, Any] = {"name": name, "value": _rounded(value), "unit": unit}
        if least is not None or most is not None:
            line["target"] = f">= {least:g}" if most is None else f"<= {most:g}"
            if value is not None:
                line["met"] = value >= least if least is not None else value <= (most or 0)
        line |= {key: _rounded(item) for key, item in more.items()} | {"measured": self.measured}
        self.lines.append(line)
        self.say(json.dumps(line))

    def require(self, name: str, value: float, unit: str, *, most: float, **more: Any) -> None:
        """A figure that must be met: raises AssertionError where it is not."""
        self.add(name, value, unit, most=most, **more)
        if not value <= most:
            raise AssertionError(f"{name} is {value:g} {unit}, and at most {most:g} is right")

    def section(self, name: str, run: Callable[[], None]) -> None:
        """Run a part; what it raises ends that part alone."""
        left = self._ends - time.monotonic()
        if left < 0:
            self.num_failed += 1
            self.say(f"== {name}: left out, no time")
            self.lines.append({"name": name, "error": "left out, no time"})
            return
        self.say(f"== {name} ({left:.0f} s left)")
        began = time.monotonic()
        try:
            run()
        except Exception as error:
            self.num_failed += 1
            self.say(traceback.format_exc())
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            self.lines.append({"name": name, "error": reason})
        self.say(f"== {name}: {time.monotonic() - began:.1f} s")
        self.write()

    def write(self) -> None:
        text = json.dumps(self._head | {"lines": self.lines}, indent=1)
        self._path.write_text(text + "\n", encoding="utf-8")


def _command() -> str:
    """As it was called, but for where the files went."""
    words = [*sys.orig_argv[2:]]
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    return " ".join(["python -m", *words])


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
