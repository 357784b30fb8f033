"""Programs compiled for an H200 on a machine without one, and what is in them.

jax's compile-only devices run the whole of XLA:GPU, Mosaic kernels through ptxas included; only
autotuning is left out. Call `prepare` before anything imports jax.
"""

import importlib.util
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "h200.txtpb"  # XLA's own description of the device
_THUNK = re.compile(r"^( *)\d{3}: (k\w+)\s+(?:\[[^\]]*\]\s*)?(\S*)")
_NO_KERNELS = (
    "kCommandBuffer", "kWhile", "kConditional", "kSequential", "kAllReduce", "kAsync",
    "kPartitionId",
)  # fmt: skip
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


class Incomplete(RuntimeError):
    """A part of the compiler is not installed."""


def prepare() -> None:
    """Point XLA to ptxas and libdevice of the installed wheels, and jax to the CPU.

    Raises Incomplete naming what is missing and how to install it.
    """
    missing = [name for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt") if not _installed(name)]
    toolkit = _toolkit()
    if toolkit is None:
        if shutil.which("ptxas") is None:
            missing += ["nvidia-cuda-nvcc==13.0.*", "nvidia-nvvm==13.0.*"]
    else:
        os.environ["PATH"] = f"{toolkit / 'bin'}{os.pathsep}{os.environ['PATH']}"
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_cuda_data_dir={toolkit}".strip()
    if missing:
        raise Incomplete(
            f"compiling for a GPU needs {', '.join(missing)}, in jax's version where it is jax's; "
            "`make check-gpu-compile` installs them in an environment of their own"
        )
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"


def _installed(package: str) -> bool:
    try:
        return version(package) == version("jax")
    except PackageNotFoundError:
        return False


def _toolkit() -> Path | None:
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(root) / "cu13"
        if (folder / "bin/ptxas").is_file() and (folder / "nvvm/libdevice").is_dir():
            return folder
    return None


def h200_devices(count: int) -> list[Any]:
    """Devices that programs are compiled for, and nothing runs on."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text("utf-8"), topology=f"1x1x{count}"
    )
    return list(topology.devices)


@dataclass(frozen=True)
class Thunk:
    """One thing that the runtime does. depth: how many loops, branches and graphs it is inside."""

    kind: str
    name: str
    depth: int


@dataclass(frozen=True)
class Program:
    """A compiled program. Bytes are those of one device."""

    executable: Any
    thunks: tuple[Thunk, ...]

    @cached_property
    def hlo(self) -> str:
        text: str = self.executable.as_text()
        return text

    @property
    def temp_bytes(self) -> int:
        return int(self.executable.memory_analysis().temp_size_in_bytes)

    @property
    def alias_bytes(self) -> int:
        return int(self.executable.memory_analysis().alias_size_in_bytes)

    @property
    def graphs(self) -> list[Thunk]:
        """The CUDA graphs: command buffers."""
        return [t for t in self.thunks if t.kind == "kCommandBuffer"]

    @property
    def outside_graphs(self) -> list[Thunk]:
        """What the host launches one by one."""
        return [t for t in self.thunks if not t.depth and t.kind != "kCommandBuffer"]

    @property
    def kernels(self) -> list[str]:
        """Names of what computes or copies, in order: no loops, graphs or exchanges of devices."""
        return [t.name for t in self.thunks if not t.kind.startswith(_NO_KERNELS)]

    @property
    def num_all_reduces(self) -> int:
        return sum(t.kind.startswith("kAllReduce") for t in self.thunks)

    def copies_of(self, shape: tuple[int, ...]) -> list[str]:
        """Instructions of the optimized program that copy an array of this shape."""
        wanted = re.compile(rf"= \w+\[{','.join(map(str, shape))}\]\S* copy(-start)?\(")
        return [line.strip() for line in self.hlo.splitlines() if wanted.search(line)]


def compile_program(lowered: Any, options: dict[str, str] | None = None) -> Program:
    """Compile for the lowered program's devices, and read what the runtime would do."""
    with tempfile.TemporaryDirectory() as folder:
        options = {**(options or {}), "xla_dump_to": folder}
        executable = lowered.compile(compiler_options=options)
        # Written only when there is a graph to make.
        found = [
            *Path(folder).glob("*thunk_sequence_after_thunk_passes.txt"),
            *Path(folder).glob("*thunk_sequence.txt"),
        ]
        text = found[0].read_text("utf-8")
    return Program(executable, tuple(read_thunks(text)))


def read_thunks(text: str) -> list[Thunk]:
    """The thunks of a dumped sequence, in order."""
    found = []
    for line in text.splitlines():
        if match := _THUNK.match(line):
            indent, kind, name = match.groups()
            found.append(Thunk(kind, name, len(indent) // 4))
    return found


def spilled_bytes(ptxas: str) -> list[int]:
    """Of each kernel in what MOSAIC_GPU_DUMP_PTXAS printed: bytes stored and loaded in spills."""
    return [int(stores) + int(loads) for stores, loads in _SPILLS.findall(ptxas)]
