"""The compiled library: found, loaded once, its handlers registered with XLA.

One library holds every instruction level of its architecture; the best one that the processor has
is chosen here, or the one that QUIRE_CPU_KERNELS names ("off": as if there were no library).
"""

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax

VARIABLE = "QUIRE_CPU_KERNELS"
PATH = Path(__file__).parent / "libquire_cpu.so"
_HANDLERS = (
    "linear", "mlp", "head_argmax", "head_top_k", "group_sums", "embed", "attention", "zeros"
)  # fmt: skip


@dataclass(frozen=True)
class Library:
    """The loaded library. levels: what this processor can run, the best first."""

    handle: Any
    levels: tuple[str, ...]
    level: str

    def set_threads(self, count: int) -> None:
        """Threads that one op may use, the caller's included; for all engines of the process."""
        assert self.handle.quire_configure(self.level.encode(), count)


@dataclass(frozen=True)
class Missing:
    """Why there is none: half a sentence for the line at the start."""

    reason: str


@cache
def load() -> Library | Missing:
    """The library with its handlers registered, loaded at the first call.

    Raises LookupError for a level that QUIRE_CPU_KERNELS names and that is not one here.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "off":
        return Missing(f"{VARIABLE}=off")
    if not PATH.is_file():
        return Missing(
            "they were not built: install a C++17 compiler (g++ or clang++) and quire again"
        )
    try:
        handle = ctypes.CDLL(str(PATH))
    except OSError as error:
        return Missing(f"{PATH.name} does not load: {error}; install quire again")
    _declare(handle)
    levels = tuple(_levels(handle))
    level = wanted or levels[0]
    if level not in levels:
        raise LookupError(
            f"{VARIABLE} must be one of this processor's levels ({', '.join(levels)}) or off, got "
            f"{wanted!r}; unset it to have the best"
        )
    built, running = handle.quire_ffi_version(), jax_ffi_version()
    if built != running:
        return Missing(
            f"they were built for version {built} of XLA's calls and this jaxlib has {running}; "
            "install quire again"
        )
    library = Library(handle, levels, level)
    library.set_threads(1)
    for name in _HANDLERS:
        symbol = getattr(handle, f"quire_{name}")
        jax.ffi.register_ffi_target(f"quire_{name}", jax.ffi.pycapsule(symbol), platform="cpu")
    return library


def jax_ffi_version() -> int:
    """Major and minor version of the calls between XLA and its handlers, as one number."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    numbers = {"XLA_FFI_API_MAJOR": 0, "XLA_FFI_API_MINOR": 0}
    with header.open(encoding="utf-8") as lines:
        for line in lines:
            match line.split():
                case ["#define", name, value] if name in numbers:
                    numbers[name] = int(value)
    return numbers["XLA_FFI_API_MAJOR"] * 1000 + numbers["XLA_FFI_API_MINOR"]


def _levels(handle: Any) -> list[str]:
    found: list[str] = []
    while (name := handle.quire_level(len(found))) is not None:
        found.append(name.decode())
    return found


def _declare(handle: Any) -> None:
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    handle.quire_level.argtypes, handle.quire_level.restype = (ctypes.c_int,), ctypes.c_char_p
    handle.quire_configure.argtypes = (ctypes.c_char_p, ctypes.c_int)
    handle.quire_pack.argtypes = (
        pointer,
        long,
        long,
        long,
        long,
        ctypes.c_int,
        ctypes.c_int,
        pointer,
    )
    handle.quire_pack.restype = None
