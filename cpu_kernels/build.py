"""Compiles csrc into libquire_cpu.so, at install (backend.py) or by this as a program:

    python -m quire.cpu_kernels.build

Each compile of level.cc is a level of instructions in the one library. Knows compilers and flags;
needs no package but jaxlib, for the headers of XLA's calls.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE / "csrc"
LIBRARY = HERE / "libquire_cpu.so"
# Of each machine, the least first: the linker keeps the first copy of a function that several
# objects have, and that copy has to run on every processor.
LEVELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "portable": (),
        "avx2": ("-march=haswell",),
        "avx512": ("-march=skylake-avx512",),
        "avx512_bf16": ("-march=cooperlake",),
        "amx": ("-march=sapphirerapids",),
    },
    "aarch64": {"portable": (), "neon": ()},
}
# No multiplication and addition may become one unless the source says so: a number would depend on
# the function that computed it.
FLAGS = (
    *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    # GCC 12 takes its own registers of undefined content for ours.
    *("-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
# Not the C++ library of this machine, which may be newer than that of the next; and only our names.
_STANDALONE = (
    *("-static-libstdc++", "-static-libgcc"),
    f"-Wl,--version-script={SOURCES / 'exports.map'}",
)


class CannotBuild(Exception):
    """Why there will be no library, in one line; output: what the compiler said."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler as it is called; machine: the first part of the triple it compiles for."""

    command: tuple[str, ...]
    machine: str

    def levels(self) -> dict[str, tuple[str, ...]]:
        return LEVELS.get(self.machine, {"portable": ()})

    def knows(self, flags: Sequence[str]) -> bool:
        """Whether it accepts the flags: an old one has not heard of every processor."""
        test = ("-x", "c++", "-fsyntax-only", os.devnull)
        return run((*self.command, *flags, *test)).returncode == 0


def find_compiler() -> Compiler | None:
    """$CXX alone if it is set, or the first of g++, c++ and clang++ that runs."""
    wanted = os.environ.get("CXX")
    commands = [tuple(shlex.split(wanted))] if wanted else [("g++",), ("c++",), ("clang++",)]
    for command in commands:
        if command and shutil.which(command[0]):
            found = run((*command, "-dumpmachine"))
            if found.returncode == 0:
                machine = found.stdout.split("-")[0].strip()
                return Compiler(command, {"arm64": "aarch64"}.get(machine, machine))
    return None


def find_headers() -> Path | None:
    """The headers of the jaxlib that this interpreter imports, or else has installed: an isolated
    build may not import it, but calls compiled for it are the ones that will be accepted.
    """
    spec = importlib.util.find_spec("jaxlib")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    for folder in (*folders, os.path.join(sysconfig.get_path("platlib"), "jaxlib")):
        include = Path(folder, "include")
        if (include / "xla" / "ffi" / "api" / "ffi.h").is_file():
            return include
    return None


def is_current(library: Path) -> bool:
    """Whether the library is there and no source of it is newer."""
    sources = [Path(__file__), *(p for p in SOURCES.iterdir() if p.is_file())]
    return library.is_file() and library.stat().st_mtime >= max(p.stat().st_mtime for p in sources)


def build(library: Path) -> None:
    """Writes the library, unless it is current. Raises CannotBuild; then there is none, not even
    an older one: its functions may not be those that this version calls.
    """
    if is_current(library):
        return
    library.unlink(missing_ok=True)
    compiler = find_compiler()
    if compiler is None:
        raise CannotBuild(
            f"CXX={os.environ['CXX']} does not run"
            if os.environ.get("CXX")
            else "there is no C++ compiler (g++ or clang++)"
        )
    headers = find_headers()
    if headers is None:
        raise CannotBuild("there is no jaxlib with the headers of XLA's calls")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        flags = ("-O3", "-isystem", str(headers))
        objects = compile_objects(compiler, flags, Path(folder), ("dispatch", "ffi"))
        made = Path(folder, library.name)
        link = (*compiler.command, "-shared", "-pthread", *map(str, objects), "-o", str(made))
        if run((*link, *_STANDALONE)).returncode != 0:  # not every toolchain has archives of these
            run_checked(link)
        # In one step: who has the old file open keeps it.
        made.replace(library)


def compile_objects(
    compiler: Compiler,
    flags: Sequence[str],
    folder: Path,
    units: Sequence[str],
    level_units: Sequence[str] = ("level",),
) -> list[Path]:
    """Objects of <unit>.cc, and of <level unit>.cc for every level that the compiler knows, in the
    order to link.
    """
    known = {name: march for name, march in compiler.levels().items() if compiler.knows(march)}
    without = [f"-DQUIRE_WITHOUT_{name.upper()}" for name in compiler.levels() if name not in known]
    jobs = [(unit, unit, tuple(without)) for unit in units]
    jobs += [
        (f"{unit}_{name}", unit, (f"-DQUIRE_LEVEL={name}", *march))
        for name, march in known.items()
        for unit in level_units
    ]

    def compile_one(job: tuple[str, str, tuple[str, ...]]) -> Path:
        name, unit, special = job
        made = folder / f"{name.replace('/', '_')}.o"
        arguments = ("-c", str(SOURCES / f"{unit}.cc"), "-o", str(made))
        run_checked((*compiler.command, *FLAGS, *flags, *special, *arguments))
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, jobs))


def run(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")


def run_checked(command: Sequence[str]) -> None:
    """Runs it, prints its warnings, raises CannotBuild when it fails."""
    found = run(command)
    if found.returncode != 0:
        errors = [line for line in found.stderr.splitlines() if "error" in line]
        reason = errors[0] if errors else f"exit code {found.returncode}"
        raise CannotBuild(f"{command[0]}: {reason}", found.stderr)
    if found.stderr:
        print(found.stderr, file=sys.stderr)


def main() -> int:
    """Builds in place; the exit code."""
    try:
        build(LIBRARY)
    except CannotBuild as error:
        print(f"{error.output}the C++ kernels were not built: {error}", file=sys.stderr)
        return 1
    print(LIBRARY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
