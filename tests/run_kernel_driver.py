"""Build cpu_kernels/csrc/driver and run it: as it is, under sanitizers, on other processors.

make check-cpu-kernels runs it; names of checks as arguments leave out the others. A tool
that is missing is an error: a check that is left out says nothing.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from quire.cpu_kernels import build

UNITS = ("dispatch", *(f"driver/{name}" for name in
         ("attention", "driver", "groups", "numbers", "products", "teams")))  # fmt: skip
LEVEL_UNITS = ("level", "driver/conversions")
AARCH64 = "aarch64-linux-gnu-g++"
# Programs, and the Debian packages that have them.
TOOLS = {
    "g++": "g++",
    AARCH64: "g++-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
    "qemu-x86_64": "qemu-user",
    "setarch": "util-linux",
}


@dataclass(frozen=True)
class Run:
    """cases: of each kind at each level; emulator: what runs the program, if not the processor."""

    cases: int
    emulator: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """One build of the driver and how to run it."""

    name: str
    flags: tuple[str, ...]
    runs: tuple[Run, ...]
    compiler: str = "g++"
    environment: dict[str, str] = field(default_factory=dict)


CHECKS = (
    # On a processor without AVX, functions that levels share have to be those of the least level.
    Check("plain", ("-O3",), (Run(150), Run(8, ("qemu-x86_64", "-cpu", "Nehalem")))),
    Check(
        "addresses and undefined behaviour",
        ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        (Run(40),),
    ),
    # Its shadow memory has fixed addresses, which randomised ones may take.
    Check(
        "threads",
        ("-O1", "-g", "-fsanitize=thread"),
        (Run(20, ("setarch", "-R")),),
        environment={"TSAN_OPTIONS": "halt_on_error=1"},
    ),
    Check(
        "aarch64",
        ("-O2",),
        (Run(30, ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")),),
        compiler=AARCH64,
    ),
)


def main() -> int:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        packages = " ".join(sorted({TOOLS[tool] for tool in missing}))
        print(f"make check-cpu-kernels needs {', '.join(missing)}: apt-get install {packages}")
        return 1
    wanted = sys.argv[1:]
    names = [check.name for check in CHECKS]
    if unknown := [name for name in wanted if name not in names]:
        print(f"no check is called {', '.join(unknown)}; there are {', '.join(names)}")
        return 1
    failed = [c.name for c in CHECKS if (not wanted or c.name in wanted) and not passes(c)]
    print(f"kernels: {', '.join(failed)} failed" if failed else "kernels: all checks passed")
    return len(failed)


def passes(check: Check) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        try:
            driver = build_driver(check, Path(folder))
        except build.CannotBuild as error:
            print(f"{error.output}{error}")
            return False
        print(f"--- {check.name}: built in {time.monotonic() - start:.0f} s", flush=True)
        for run in check.runs:
            command = (*run.emulator, str(driver), str(run.cases))
            found = subprocess.run(command, env=os.environ | check.environment, check=False)
            if found.returncode != 0:
                print(f"--- {check.name}: {' '.join(command)} gave {found.returncode}", flush=True)
                return False
        print(f"--- {check.name}: passed after {time.monotonic() - start:.0f} s", flush=True)
    return True


def build_driver(check: Check, folder: Path) -> Path:
    """Raises CannotBuild."""
    machine = build.run((check.compiler, "-dumpmachine")).stdout.split("-")[0]
    compiler = build.Compiler((check.compiler,), machine)
    flags = (*check.flags, "-Werror")
    objects = build.compile_objects(compiler, flags, folder, UNITS, LEVEL_UNITS)
    driver = folder / "driver"
    build.run_checked(
        (check.compiler, *check.flags, "-pthread", *map(str, objects), "-o", str(driver))
    )
    return driver


if __name__ == "__main__":
    sys.exit(main())
