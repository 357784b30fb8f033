"""The library's build, with a compiler that only notes what it was asked for."""

import os
from pathlib import Path

import pytest
from quire.cpu_kernels import build

# Knows no sapphirerapids, no static C++ library, and no ffi.cc if it is told so.
COMPILER = """#!/bin/sh
echo "$*" >> "{log}"
case "$*" in
  *-dumpmachine*) echo x86_64-linux-gnu; exit 0;;
  *sapphirerapids*|*-static-libstdc++*) exit 1;;
  *{fails}*) echo "ffi.cc:1:1: error: broken" >&2; exit 1;;
esac
while [ $# -gt 1 ]; do
  if [ "$1" = -o ]; then echo made > "$2"; fi
  shift
done
"""


def install_compiler(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fails: str = "nothing.cc"
) -> Path:
    """The log of its calls."""
    log, compiler = folder / "log", folder / "c++"
    compiler.write_text(COMPILER.format(log=log, fails=fails))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    return log


def test_build_leaves_out_what_the_compiler_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = install_compiler(tmp_path, monkeypatch)
    library = tmp_path / "libquire_cpu.so"
    build.build(library)
    assert library.read_text() == "made\n"
    calls = log.read_text().splitlines()
    compiled = [call for call in calls if " -c " in call]
    levels = [
        call.partition("-DQUIRE_LEVEL=")[2].split()[0] for call in compiled if "LEVEL=" in call
    ]
    assert sorted(levels) == ["avx2", "avx512", "avx512_bf16", "portable"]
    (dispatch,) = [call for call in compiled if "dispatch.cc" in call]
    assert "-DQUIRE_WITHOUT_AMX" in dispatch
    assert "-static-libstdc++" in calls[-2]
    assert "-static-libstdc++" not in calls[-1]
    # The least level first: the linker keeps the first of equal functions.
    objects = [Path(word).stem for word in calls[-1].split() if word.endswith(".o")]
    assert objects[:3] == ["dispatch", "ffi", "level_portable"]


def test_build_is_not_repeated_before_a_source_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = install_compiler(tmp_path, monkeypatch)
    library = tmp_path / "libquire_cpu.so"
    build.build(library)
    log.unlink()
    build.build(library)
    assert not log.exists()
    os.utime(library, (0, 0))
    build.build(library)
    assert log.exists()


def test_build_that_fails_leaves_no_older_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libquire_cpu.so"
    library.write_text("older")
    os.utime(library, (0, 0))
    install_compiler(tmp_path, monkeypatch, fails="ffi.cc")
    with pytest.raises(build.CannotBuild, match=r"c\+\+: ffi.cc:1:1: error: broken$"):
        build.build(library)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c++", "log"]


def test_build_without_a_compiler_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(build.CannotBuild, match=r"^CXX=/nonexistent/c\+\+ does not run$"):
        build.build(tmp_path / "libquire_cpu.so")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.CannotBuild, match=r"^there is no C\+\+ compiler"):
        build.build(tmp_path / "libquire_cpu.so")
