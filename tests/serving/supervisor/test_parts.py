"""The folder of the sockets, what is shown, and the limits."""

import io
import stat
from pathlib import Path

import pytest
from quire.engine.errors import ConfigError
from quire.serving.supervisor.display import Display
from quire.serving.supervisor.folder import private_folder
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


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_of_a_terminal() -> None:
    shown = _Terminal()
    display = Display(shown)
    for done in range(3):
        display.progress("programs", done, 2)
    display.line("ready")
    assert shown.getvalue() == ("programs: 0 of 2\r\x1b[Kprograms: 1 of 2\r\x1b[Kready\n")


def test_progress_is_not_written_to_files() -> None:
    shown = io.StringIO()
    display = Display(shown)
    display.progress("programs", 1, 2)
    display.line("ready")
    assert shown.getvalue() == "ready\n"


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
