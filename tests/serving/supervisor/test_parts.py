"""The folder of the sockets, the limits, and the standard streams."""

import asyncio
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from quire.engine.errors import ConfigError
from quire.serving.supervisor.folder import private_folder
from quire.serving.supervisor.ping import answering_pings, ping
from quire.serving.supervisor.supervisor import Limits


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("quire.serving.supervisor.folder._MAX_SOCKET_BYTES", 500)
    return tmp_path


def test_folder_is_private_and_gone_at_the_end(temporary: Path) -> None:
    with private_folder({}) as folder:
        assert folder.parent == temporary
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "core.sock").touch()
    assert not folder.exists()


def test_folder_is_in_the_runtime_folder_if_there_is_one(temporary: Path) -> None:
    runtime = temporary / "runtime"
    runtime.mkdir()
    with private_folder({"XDG_RUNTIME_DIR": str(runtime)}) as folder:
        assert folder.parent == runtime
    with private_folder({"XDG_RUNTIME_DIR": str(runtime / "absent")}) as folder:
        assert folder.parent == temporary


def test_folder_that_is_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    runtime = tmp_path / ("long" * 30)
    runtime.mkdir()
    with (
        pytest.raises(ConfigError, match="may have 103; set XDG_RUNTIME_DIR to a shorter folder"),
        private_folder({"XDG_RUNTIME_DIR": str(runtime)}),
    ):
        pass
    assert list(runtime.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step_timeout_s", 0),
        ("drain_timeout_s", -1),
        ("max_restarts", -1),
        ("restart_window_s", -1),
    ],
)
def test_limits_are_checked(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be .* got {value}"):
        Limits(**{name: value})


@pytest.mark.parametrize("closed", ["2", "0, 2", "0, 1, 2"])
def test_closed_standard_streams_are_opened(closed: str) -> None:
    """A socket in the place of stderr would be written to by whoever writes to stderr."""
    script = f"""
import os, sys
from quire.serving.supervisor.command import open_standard_streams
answer = os.dup(1)
for fd in ({closed},):
    os.close(fd)
open_standard_streams()
streams = [os.fstat(fd).st_rdev == os.stat(os.devnull).st_rdev for fd in ({closed},)]
inherited = [os.get_inheritable(fd) for fd in range(3)]
os.write(answer, repr((streams, inherited, os.open(os.devnull, os.O_RDONLY) > 2)).encode())
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True
    )
    count = len(closed.split(","))
    assert done.stdout == repr(([True] * count, [True] * 3, True))


def test_ping_is_answered_by_a_loop_that_moves_and_by_no_other(temporary: Path) -> None:
    """Also where the socket of one that was killed is left."""

    async def run(path: Path) -> None:
        for _ in range(2):
            async with answering_pings(path):
                await ping(path)
        path.unlink(missing_ok=True)
        with pytest.raises(FileNotFoundError):
            await ping(path)
        with socket.socket(socket.AF_UNIX) as killed:
            killed.bind(os.fspath(path))
        with pytest.raises(ConnectionRefusedError):
            await ping(path)
        async with answering_pings(path):
            await ping(path)
        with socket.socket(socket.AF_UNIX) as silent:
            path.unlink(missing_ok=True)
            silent.bind(os.fspath(path))
            silent.listen()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ping(path), 0.1)

    with private_folder({}) as folder:
        asyncio.run(run(folder / "0.sock"))
