import os
import stat
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from quire.engine import compiler
from quire.engine.compiler import ProgramSpec, compile_all, default_cache_dir, open_cache
from quire.engine.errors import ConfigError


@pytest.fixture
def jax_cache():
    """open_cache changes jax for the whole process: put it back."""
    from jax.experimental.compilation_cache import compilation_cache

    names = (
        "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes", "jax_compilation_cache_max_size",
    )  # fmt: skip
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        open_cache(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"QUIRE_CACHE_DIR": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"QUIRE_CACHE_DIR": "~/b"}, "/home/me/b"),
        ({"QUIRE_CACHE_DIR": "", "XDG_CACHE_HOME": "/c"}, "/c/quire"),
        ({}, "/home/me/.cache/quire"),
    ],
)
def test_default_cache_dir(
    environment: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
):
    for name in ("QUIRE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    assert default_cache_dir() == Path(folder)


def test_a_new_cache_is_private_and_jax_uses_it(tmp_path: Path, jax_cache: None):
    folder = tmp_path / "a" / "b"
    assert open_cache(folder) == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert jax.config.jax_compilation_cache_dir == str(folder / "programs")
    assert open_cache(folder) == folder


def test_a_cache_of_someone_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = Path.stat

    def stat_of_another(self: Path, **options: Any) -> Any:
        status = real(self, **options)
        if self != tmp_path:
            return status
        return SimpleNamespace(st_uid=status.st_uid + 7, st_mode=status.st_mode)

    monkeypatch.setattr(Path, "stat", stat_of_another)
    me = os.geteuid()
    assert refusal(tmp_path) == (
        f"the compile cache {tmp_path} belongs to user {me + 7}, not to you ({me}), and compiled "
        "programs are code; set cache_dir or QUIRE_CACHE_DIR to a folder of your own"
    )


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_cache_that_others_can_write_is_refused(mode: int, tmp_path: Path):
    tmp_path.chmod(mode)
    assert refusal(tmp_path) == (
        f"the compile cache {tmp_path} can be written by others (mode {mode:o}), and compiled "
        "programs are code; chmod 700 it, or set cache_dir or QUIRE_CACHE_DIR to a folder of your "
        "own"
    )


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It was taken, and the first write ended in a traceback."""
    tmp_path.chmod(0o500)
    # Root may write anywhere: let the answer be that of another user.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    message = refusal(tmp_path)
    assert message.startswith(f"the compile cache {tmp_path} is read-only; set cache_dir or QUIRE_")


def test_a_cache_that_cannot_be_made_is_refused(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    for folder, reason in ((file, "File exists"), (file / "below", "Not a directory")):
        assert refusal(folder) == (
            f"the compile cache {folder} cannot be made ({reason}); set cache_dir or "
            "QUIRE_CACHE_DIR to a folder that you can write to"
        )


def specs(scale: float, count: int = 3) -> list[ProgramSpec]:
    def lower(n: int) -> Any:
        x = jax.ShapeDtypeStruct((n + 1,), jnp.float32)
        return jax.jit(lambda x: jnp.sin(x) * scale + n).lower(x)

    return [ProgramSpec(f"p{n}", lambda n=n: lower(n)) for n in range(count)]


def test_compile_all_counts_what_came_from_the_cache(tmp_path: Path, jax_cache: None):
    open_cache(tmp_path / "cache")
    names: list[str] = []
    made, report = compile_all(specs(1.5), names.append)
    assert sorted(names) == sorted(made) == ["p0", "p1", "p2"]
    assert (report.loaded, report.compiled) == (0, 3)
    assert made["p2"](jnp.zeros(3)).tolist() == [2.0] * 3
    jax.clear_caches()
    _, report = compile_all([*specs(1.5), ProgramSpec("other", specs(2.5, 1)[0].lower)])
    assert (report.loaded, report.compiled) == (3, 1)
    assert report.line().startswith("4 programs in ")
    assert "3 loaded, 1 compiled (tracing " in report.line()


def test_compile_all_does_not_count_other_threads(tmp_path: Path, jax_cache: None):
    """Random weights are made beside it; loading their programs made the count negative."""
    open_cache(tmp_path / "cache")
    compile_all(specs(3.5))
    jax.clear_caches()

    def lower_while_another_thread_loads() -> Any:
        other = threading.Thread(target=lambda: [s.lower().compile() for s in specs(3.5)])
        other.start()
        other.join()
        return specs(4.5, 1)[0].lower()

    before = compiler.num_compile_events()
    _, report = compile_all([ProgramSpec("mine", lower_while_another_thread_loads)])
    assert (report.loaded, report.compiled) == (0, 1)
    assert compiler.num_compile_events() > before


def test_compile_all_raises_what_a_program_raises():
    previous = threading.stack_size()

    def fail() -> Any:
        raise ValueError("no such shape")

    with pytest.raises(ValueError, match="no such shape"):
        compile_all([*specs(5.5, 1), ProgramSpec("bad", fail)])
    assert threading.stack_size() == previous
