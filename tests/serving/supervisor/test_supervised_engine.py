"""A supervised core: whatever happens to it, the next one gives the same tokens."""

import asyncio
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from quire.engine.core_io import Submission
from quire.engine.sampling_params import SamplingParams
from quire.serving.core_client.client import CoreClient, CoreStatus

from ..core.cores import OPTIONS, WAIT_S, ended_because, finish, token_ids, until
from .supervised import Supervised, is_alive, lines, wait_until

# Long enough for a step on a busy machine.
STEP_TIMEOUT_S = 3.0
PARAMS = SamplingParams(temperature=1.1, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def supervised(folder: Path) -> Iterator[Supervised]:
    limits = {"step_timeout_s": STEP_TIMEOUT_S}
    gateway = {"log": str(folder / "gateway.log")}
    with Supervised(folder, engine=OPTIONS, gateway=gateway, limits=limits) as made:
        made.until_said("ready in")
        yield made


def core_socket(supervised: Supervised) -> Path:
    (folder,) = supervised.runtime.iterdir()
    return folder / "core.sock"


def core_pid(supervised: Supervised) -> int:
    cores = [
        pid
        for pid in supervised.children()
        if b"quire.serving.core" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(cores) == 1
    return cores[0]


def answer(path: Path) -> tuple[list[int], CoreStatus]:
    """The same request to whichever core is there, once it is."""

    async def run() -> tuple[list[int], CoreStatus]:
        client = CoreClient(path)
        try:
            await client.status(WAIT_S, is_starting=True)
            submission = Submission("a", tuple(range(3, 30)), PARAMS, 1)
            outputs = await finish(client.open_stream(), [submission])
            return token_ids(outputs["a"]), await client.status(5)
        finally:
            await client.close()

    return asyncio.run(run())


def busy(path: Path) -> Any:
    """A core with a request under way, and what becomes of its stream."""

    async def run(harm: Any) -> str:
        client = CoreClient(path)
        try:
            await client.status(WAIT_S, is_starting=True)
            stream = client.open_stream()
            params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
            some = [Submission(f"{i}", tuple(range(3, 30)), params, 1) for i in range(99)]
            stream.submit(some)
            await until(client, lambda s: s.num_running > 3)
            harm()
            return await ended_because(stream)
        finally:
            await client.close()

    return run


@pytest.fixture(scope="module")
def expected(supervised: Supervised) -> list[int]:
    """What the first core answers."""
    tokens, _ = answer(core_socket(supervised))
    return tokens


def test_start_is_shown_and_its_folder_is_private(supervised: Supervised, folder: Path) -> None:
    tokens, status = answer(core_socket(supervised))
    assert len(tokens) == 40
    assert status.num_compiles == 0
    for phase in ("model ", "14 programs in", "weights", "ready in"):
        assert phase in supervised.text
    path = core_socket(supervised)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    arguments = Path(f"/proc/{core_pid(supervised)}/cmdline").read_bytes().split(b"\0")
    assert len([a for a in arguments if a]) == 6, "options are not for every user of this machine"
    wait_until(lambda: "core ready 0" in lines(folder / "gateway.log"))


@pytest.mark.parametrize("number", [1, 2, 3], ids=["kill", "stop at work", "stop at rest"])
def test_core_is_replaced_and_gives_the_same_tokens(
    supervised: Supervised, folder: Path, expected: list[int], number: int
) -> None:
    pid = core_pid(supervised)
    signal_number = signal.SIGKILL if number == 1 else signal.SIGSTOP
    if number == 3:
        os.kill(pid, signal_number)
    else:
        why = asyncio.run(busy(core_socket(supervised))(lambda: os.kill(pid, signal_number)))
        assert "the core was lost" in why
    wait_until(lambda: f"core ready {number}" in lines(folder / "gateway.log"))
    assert not is_alive(pid)
    assert supervised.process.poll() is None
    tokens, status = answer(core_socket(supervised))
    assert tokens == expected
    assert status.num_compiles == 0
    said = "(killed by SIGKILL)" if number == 1 else f"not answered for {STEP_TIMEOUT_S:g} s"
    assert said in supervised.text
    assert f"restarting it ({number} of 5 times in 300 s)" in supervised.text


def test_sigterm_leaves_nothing(supervised: Supervised) -> None:
    pids = supervised.children()
    assert len(pids) == 2
    supervised.send(signal.SIGTERM)
    assert supervised.wait(8) == 0
    assert not any(map(is_alive, pids))
    assert list(supervised.runtime.iterdir()) == []


def test_core_ends_with_a_killed_supervisor(tmp_path: Path) -> None:
    """While it starts, when its threads are in compilers."""
    with Supervised(tmp_path, engine=OPTIONS) as supervised:
        supervised.until_said("ops: ")
        pid = core_pid(supervised)
        supervised.process.kill()
        wait_until(lambda: not is_alive(pid), timeout_s=2)
        assert not is_alive(pid)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"model": "/no/such/folder"}, "/no/such/folder"),
        ({**OPTIONS, "max_model_len": 10**9}, "max_model_len"),
        ({**OPTIONS, "max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
    ],
    ids=["model", "does not fit", "option"],
)
def test_wrong_use_is_one_line_and_no_restart(
    tmp_path: Path, options: dict[str, Any], why: str
) -> None:
    with Supervised(tmp_path, engine=options) as supervised:
        assert supervised.wait() == 2
        refusals = [line for line in supervised.text.splitlines() if line.startswith("quire: ")]
        assert len(refusals) == 1
        assert why in refusals[0]
        assert "Traceback" not in supervised.text
        assert list(supervised.runtime.iterdir()) == []
