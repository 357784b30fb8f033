"""Compiles a closed set of programs ahead of time, in parallel, through a persistent cache.

Programs are traced and lowered on the calling thread (tracing holds the GIL) and compiled in a
pool. A counter of compile events of the whole process is kept here: after warm-up it must not move.
"""

import ctypes
import gc
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from .errors import ConfigError

CACHE_BYTES = 20 << 30
# LLVM recurses deeply on large programs; the default stack of a thread is too small for it.
_STACK_BYTES = 64 << 20


@dataclass(frozen=True)
class ProgramSpec:
    """A program to build: its name in messages, and how to trace and lower it."""

    name: str
    lower: Callable[[], jax.stages.Lowered]


@dataclass(frozen=True)
class CompileReport:
    """What compile_all did. loaded came from the persistent cache, compiled did not; lower_s is CPU
    time, since other threads share the cores.
    """

    loaded: int
    compiled: int
    lower_s: float
    total_s: float

    def line(self) -> str:
        return (
            f"{self.loaded + self.compiled} programs in {self.total_s:.1f} s: {self.loaded} "
            f"loaded, {self.compiled} compiled (tracing {self.lower_s:.1f} s)"
        )


class _Events:
    """Counts jax's monitoring events; one per process, because jax's listeners are."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count_by_event: dict[str, int] = {}
        self._is_listening = False
        self._of_thread = threading.local()

    def listen(self) -> None:
        with self._lock:
            if self._is_listening:
                return
            jax.monitoring.register_event_listener(self._on_event)
            jax.monitoring.register_event_duration_secs_listener(self._on_duration)
            self._is_listening = True

    def _on_event(self, event: str, **_: Any) -> None:
        with self._lock:
            self.count_by_event[event] = self.count_by_event.get(event, 0) + 1
        if event == _CACHE_HIT:
            self._of_thread.num_hits = self.num_hits_here() + 1

    def num_hits_here(self) -> int:
        """Programs that this thread took from the cache; others may be compiling too."""
        hits: int = getattr(self._of_thread, "num_hits", 0)
        return hits

    def _on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        self._on_event(event)

    def count(self, *parts: str) -> int:
        with self._lock:
            return sum(
                n for event, n in self.count_by_event.items() if any(p in event for p in parts)
            )


_CACHE_HIT = "/jax/compilation_cache/cache_hits"
_EVENTS = _Events()


def num_compile_events() -> int:
    """Traces, lowerings and compiles of this process since the first engine; must stand still while
    serving.
    """
    return _EVENTS.count("/jax/core/compile/")


def compile_all(
    specs: Iterable[ProgramSpec],
    progress: Callable[[str], None] = lambda name: None,
    options: dict[str, str] | None = None,
) -> tuple[dict[str, Any], CompileReport]:
    """name -> executable, and what it took. `progress` is called with each finished name; options
    are XLA's.
    """
    _EVENTS.listen()
    start = time.perf_counter()
    lower_s = 0.0
    futures: dict[str, Future[tuple[Any, bool]]] = {}

    def finish(name: str, lowered: jax.stages.Lowered) -> tuple[Any, bool]:
        before = _EVENTS.num_hits_here()
        compiled = lowered.compile(compiler_options=options)
        progress(name)
        return compiled, _EVENTS.num_hits_here() > before

    previous = threading.stack_size(_STACK_BYTES)
    collects = gc.isenabled()
    # Tracing makes millions of objects that live on: collecting costs 15 % of it and frees none.
    gc.disable()
    try:
        with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="compile") as pool:
            for spec in specs:
                before = time.thread_time()
                lowered = spec.lower()
                lower_s += time.thread_time() - before
                futures[spec.name] = pool.submit(finish, spec.name, lowered)
            results = {name: future.result() for name, future in futures.items()}
    finally:
        threading.stack_size(previous)
        if collects:
            gc.enable()
    loaded = sum(was_loaded for _, was_loaded in results.values())
    report = CompileReport(loaded, len(results) - loaded, lower_s, time.perf_counter() - start)
    return {name: executable for name, (executable, _) in results.items()}, report


def return_freed_memory() -> None:
    """Give what the compiler and the loading of weights freed back to the system; glibc keeps
    hundreds of MiB otherwise.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def default_cache_dir() -> Path:
    """$QUIRE_CACHE_DIR, else $XDG_CACHE_HOME/quire, else ~/.cache/quire."""
    if given := os.environ.get("QUIRE_CACHE_DIR"):
        return Path(os.path.expanduser(given))
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(os.path.expanduser(base or "~/.cache")) / "quire"


def open_cache(folder: Path) -> Path:
    """Make the folder private, and jax keep compiled programs in it. Returns the folder.

    Compiled programs are code: a folder that someone else owns or can write to is refused with
    ConfigError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError as error:
        raise ConfigError(
            f"the compile cache {folder} cannot be made ({error.strerror}); set cache_dir or "
            "QUIRE_CACHE_DIR to a folder that you can write to"
        ) from error
    way_out = "set cache_dir or QUIRE_CACHE_DIR to a folder of your own"
    if status.st_uid != os.geteuid():
        raise ConfigError(
            f"the compile cache {folder} belongs to user {status.st_uid}, not to you "
            f"({os.geteuid()}), and compiled programs are code; {way_out}"
        )
    if stat.S_IMODE(status.st_mode) & 0o022:
        raise ConfigError(
            f"the compile cache {folder} can be written by others (mode "
            f"{stat.S_IMODE(status.st_mode):o}), and compiled programs are code; chmod 700 it, or "
            f"{way_out}"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"the compile cache {folder} is read-only; {way_out}")
    _EVENTS.listen()
    programs = folder / "programs"
    if jax.config.jax_compilation_cache_dir != str(programs):
        from jax.experimental.compilation_cache import compilation_cache

        # jax reads the folder once, at the first compile; a change later needs a reset.
        jax.config.update("jax_compilation_cache_dir", str(programs))
        compilation_cache.reset_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    return folder
