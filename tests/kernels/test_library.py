"""Why there may be no library, each in its words; what is loaded is not touched."""

from pathlib import Path

import pytest
from quire.cpu_kernels import library
from quire.engine.processors import describe_kernels


def reason(monkeypatch: pytest.MonkeyPatch, path: Path | None = None) -> str:
    monkeypatch.delenv(library.VARIABLE, raising=False)
    if path is not None:
        monkeypatch.setattr(library, "PATH", path)
    found = library.load.__wrapped__()
    assert isinstance(found, library.Missing)
    return found.reason


def test_a_library_that_was_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    why = reason(monkeypatch, tmp_path / "libquire_cpu.so")
    assert why == "they were not built: install a C++17 compiler (g++ or clang++) and quire again"
    line = describe_kernels(library.Missing(why), None).line
    assert line == f"none, {why}; XLA's ops serve, several times slower"


def test_a_library_that_is_damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    damaged = tmp_path / "libquire_cpu.so"
    damaged.write_bytes(b"\x7fELF")
    why = reason(monkeypatch, damaged)
    assert why.startswith("libquire_cpu.so does not load: ")
    assert why.endswith("; install quire again")


@pytest.mark.skipif(not library.PATH.is_file(), reason="there are no C++ kernels here")
def test_a_library_for_another_jaxlib(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library, "jax_ffi_version", lambda: 9009)
    why = reason(monkeypatch)
    assert why.startswith("they were built for version ")
    assert why.endswith(" of XLA's calls and this jaxlib has 9009; install quire again")


def test_a_library_that_is_not_wanted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(library.VARIABLE, "off")
    assert library.load.__wrapped__() == library.Missing("QUIRE_CPU_KERNELS=off")


def test_threads_that_were_asked_for_are_given():
    given: list[int] = []

    class Handle:
        def quire_configure(self, level: bytes, count: int) -> int:
            given.append(count)
            return 1

    kernels = describe_kernels(library.Library(Handle(), ("avx2",), "avx2"), 3)
    assert kernels.line == "avx2, 3 threads (cpu_threads)"
    kernels.use()
    assert given == [3]
