"""Starting, restarting and ending children, with children that have no engine."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from .supervised import Supervised, fill, is_alive, lines, wait_until

READY = "quire: ready in 0.0 s\n"


class Fakes:
    """Options of fake children, and what each of them noted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def options(self, **options_by_name: dict[str, Any]) -> dict[str, Any]:
        return {
            name: {"log": str(self.folder / f"{name}.log"), **options}
            for name, options in options_by_name.items()
        }

    def noted(self, name: str) -> list[str]:
        return lines(self.folder / f"{name}.log")

    def pids(self, name: str) -> list[int]:
        return [int(line[4:]) for line in self.noted(name) if line.startswith("pid ")]

    def until_noted(self, name: str, line: str, count: int = 1) -> None:
        wait_until(lambda: self.noted(name).count(line) >= count)


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path)


def test_sigterm_ends_everything(fakes: Fakes, tmp_path: Path) -> None:
    children = fakes.options(core={}, gateway={})
    with Supervised(tmp_path, children=children) as supervised:
        fakes.until_noted("gateway", "core ready 0")
        fakes.until_noted("core", "gateway ready 0")
        supervised.send(signal.SIGTERM)
        assert supervised.wait(5) == 0
        assert not any(is_alive(pid) for name in children for pid in fakes.pids(name))
        assert supervised.text == READY


def test_gateway_drains_before_the_core_ends(fakes: Fakes, tmp_path: Path) -> None:
    children = fakes.options(core={}, gateway={"drain_s": 0.5})
    with Supervised(tmp_path, children=children) as supervised:
        fakes.until_noted("gateway", "core ready 0")
        supervised.send(signal.SIGTERM)
        fakes.until_noted("gateway", "term")
        assert is_alive(fakes.pids("core")[0])
        fakes.until_noted("gateway", "drained")
        assert supervised.wait(5) == 0
        assert {"term", "drained"} <= set(fakes.noted("core"))


def test_drain_ends_after_its_time(fakes: Fakes, tmp_path: Path) -> None:
    children = fakes.options(core={}, gateway={"is_deaf": True})
    with Supervised(tmp_path, children=children, limits={"drain_timeout_s": 0.2}) as supervised:
        fakes.until_noted("gateway", "core ready 0")
        fakes.until_noted("core", "gateway ready 0")
        supervised.send(signal.SIGTERM)
        assert supervised.wait(8) == 0
        assert supervised.text == (
            READY + "quire: the gateway did not end within 2.2 s; killing it\n"
        )
        assert not any(is_alive(pid) for name in children for pid in fakes.pids(name))


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_kills_at_once(fakes: Fakes, tmp_path: Path, second: signal.Signals) -> None:
    children = fakes.options(core={}, gateway={"drain_s": 60})
    with Supervised(tmp_path, children=children) as supervised:
        fakes.until_noted("gateway", "core ready 0")
        supervised.send(signal.SIGINT)
        fakes.until_noted("gateway", "term")
        supervised.send(second)
        assert supervised.wait(2) == 128 + second
        assert not any(is_alive(pid) for name in children for pid in fakes.pids(name))


def test_core_is_restarted_during_a_drain(fakes: Fakes, tmp_path: Path) -> None:
    """Open requests are resumed in it."""
    children = fakes.options(core={}, gateway={"drain_s": 1.5})
    with Supervised(tmp_path, children=children) as supervised:
        fakes.until_noted("gateway", "core ready 0")
        supervised.send(signal.SIGTERM)
        fakes.until_noted("gateway", "term")
        subprocess.run(["kill", "-9", str(fakes.pids("core")[0])], check=True)
        wait_until(lambda: len(fakes.pids("core")) == 2)
        assert supervised.wait(8) == 0


@pytest.mark.parametrize("is_stopped", [False, True])
def test_children_do_not_outlive_a_killed_supervisor(
    fakes: Fakes, tmp_path: Path, is_stopped: bool
) -> None:
    children = fakes.options(core={}, gateway={"is_deaf": True})
    with Supervised(tmp_path, children=children) as supervised:
        fakes.until_noted("gateway", "core ready 0")
        fakes.until_noted("core", "gateway ready 0")
        pids = fakes.pids("core") + fakes.pids("gateway")
        if is_stopped:
            subprocess.run(["kill", "-STOP", *map(str, pids)], check=True)
        supervised.process.kill()
        wait_until(lambda: not any(map(is_alive, pids)), timeout_s=2)
        assert not any(map(is_alive, pids))


def test_ended_child_is_restarted_and_the_others_are_told(fakes: Fakes, tmp_path: Path) -> None:
    children = fakes.options(core={}, gateway={})
    with Supervised(tmp_path, children=children) as supervised:
        fakes.until_noted("gateway", "core ready 0")
        fakes.until_noted("core", "gateway ready 0")
        subprocess.run(["kill", "-9", str(fakes.pids("core")[0])], check=True)
        fakes.until_noted("gateway", "core ready 1")
        assert fakes.noted("gateway")[-3:] == ["core ended 0", "core starting 1", "core ready 1"]
        assert len(fakes.pids("gateway")) == 1
        supervised.send(signal.SIGTERM)
        assert supervised.wait(5) == 0
        assert supervised.text == (
            READY
            + "quire: the core ended (killed by SIGKILL); restarting it (1 of 5 times in 300 s)\n"
            "quire: the core is ready again after 0.0 s\n"
        )


def test_ready_says_where_and_again_after_a_restart(fakes: Fakes, tmp_path: Path) -> None:
    children = fakes.options(core={}, gateway={"address": "127.0.0.1:50051 (gRPC)"})
    with Supervised(tmp_path, children=children) as supervised:
        supervised.until_said("quire: ready in 0.0 s, serving on 127.0.0.1:50051 (gRPC)\n")
        subprocess.run(["kill", "-9", str(fakes.pids("gateway")[0])], check=True)
        supervised.until_said(
            "quire: the gateway is ready again after 0.0 s, serving on 127.0.0.1:50051 (gRPC)\n"
        )
        assert supervised.text.count("ready in") == 1


def test_a_child_that_ends_before_all_are_ready_is_not_ready_again(
    fakes: Fakes, tmp_path: Path
) -> None:
    children = fakes.options(core={"exit_code": 3}, gateway={})
    with Supervised(tmp_path, children=children, limits={"max_restarts": 2}) as supervised:
        assert supervised.wait() == 1
        assert "ready" not in supervised.text


def test_progress_is_cleared_when_its_child_is_gone(fakes: Fakes, tmp_path: Path) -> None:
    children = fakes.options(core={"progress": [["programs", 1, 2]]}, gateway={})
    ours, theirs = os.openpty()
    with Supervised(tmp_path, stderr_fd=theirs, children=children) as supervised:
        os.close(theirs)
        fakes.until_noted("gateway", "core ready 0")
        fakes.until_noted("core", "gateway ready 0")
        subprocess.run(["kill", "-9", str(fakes.pids("core")[0])], check=True)
        fakes.until_noted("gateway", "core starting 1")
        supervised.send(signal.SIGTERM)
        assert supervised.wait(5) == 0
        text = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "programs ━━━━━━────── 1/2\r\x1b[Kquire: the core ended" in text
    last = text.rpartition("\n")[2]
    assert last == "" or last.endswith("\r\x1b[K")


@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "stopped reading"])
def test_supervision_goes_on_without_a_reader(fakes: Fakes, tmp_path: Path, is_gone: bool) -> None:
    """`quire engine … 2>&1 | less`: the pipe is full or broken, and the core is restarted."""
    children = fakes.options(core={}, gateway={})
    ours, theirs = os.pipe()
    if is_gone:
        os.close(ours)
    else:
        fill(theirs)
    with Supervised(tmp_path, stderr_fd=theirs, children=children) as supervised:
        os.close(theirs)
        fakes.until_noted("gateway", "core ready 0")
        subprocess.run(["kill", "-9", str(fakes.pids("core")[0])], check=True)
        fakes.until_noted("gateway", "core ready 1")
        supervised.send(signal.SIGTERM)
        assert supervised.wait(5) == 0
        assert not any(is_alive(pid) for name in children for pid in fakes.pids(name))
    if not is_gone:
        os.close(ours)


@pytest.mark.parametrize(
    ("question", "why"),
    [("unanswered", "it has not answered for 0.3 s: timed out"), ("stuck", "it stands still")],
)
def test_child_that_is_stuck_is_restarted(
    fakes: Fakes, tmp_path: Path, question: str, why: str
) -> None:
    children = fakes.options(core={"question": question}, gateway={})
    with Supervised(tmp_path, children=children, limits={"step_timeout_s": 0.3}) as supervised:
        fakes.until_noted("gateway", "core ready 1")
        supervised.until_said(f"({why}); restarting it")


def test_restarts_have_a_budget(fakes: Fakes, tmp_path: Path) -> None:
    children = fakes.options(core={"exit_code": 3}, gateway={})
    with Supervised(tmp_path, children=children, limits={"max_restarts": 2}) as supervised:
        assert supervised.wait() == 1
        assert len(fakes.pids("core")) == 3
        *restarts, last = supervised.text.splitlines()
        assert len(restarts) == 2
        assert last == (
            "quire: the core ended (exit code 3) after 2 restarts in 300 s; giving up, its "
            "messages above say more"
        )
        # It may not even have told its pid when the core had ended three times.
        assert not any(map(is_alive, fakes.pids("gateway")))


def test_restarts_of_long_ago_do_not_count(fakes: Fakes, tmp_path: Path) -> None:
    children = fakes.options(core={"exit_code": 3})
    limits = {"max_restarts": 1, "restart_window_s": 0.01}
    with Supervised(tmp_path, children=children, limits=limits) as supervised:
        wait_until(lambda: len(fakes.pids("core")) > 4)
        assert supervised.process.poll() is None


def test_refusal_ends_with_its_line(fakes: Fakes, tmp_path: Path) -> None:
    children = fakes.options(core={"refusal": "no such model; give another"}, gateway={})
    with Supervised(tmp_path, children=children) as supervised:
        assert supervised.wait() == 2
        assert supervised.text == "quire: no such model; give another\n"
        assert len(fakes.pids("core")) == 1
        assert not any(map(is_alive, fakes.pids("gateway")))


def test_sigterm_right_at_the_start_leaves_nothing(fakes: Fakes, tmp_path: Path) -> None:
    children = fakes.options(core={}, gateway={})
    with Supervised(tmp_path, children=children) as supervised:
        wait_until(lambda: supervised.children())
        supervised.send(signal.SIGTERM)
        supervised.wait(5)
        time.sleep(0.1)
        assert not any(is_alive(pid) for name in children for pid in fakes.pids(name))


def test_supervisor_and_client_load_no_jax() -> None:
    code = (
        "import sys, quire.serving.supervisor.command, quire.serving.core_client.client\n"
        "import quire.serving.core_client.wire, quire.serving.supervisor.channel\n"
        "assert not {'jax', 'flax', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
