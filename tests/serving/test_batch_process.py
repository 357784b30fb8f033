"""`quire generate --input` as a process: flags, streams, signals, kills, full disks, memory."""

import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from quire import LLM
from quire.serving import cli

from .batch_runs import (
    FLAGS,
    OPTIONS,
    answers,
    child,
    many,
    num_lines,
    results_in,
    run,
    stop_at,
    write_lines,
)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The engine that the child's flags make."""
    with LLM(**OPTIONS) as llm:
        yield llm


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "in"], "quire: --input needs --output FILE for the results; - is stdout"),
        (["--prompt", "x", "--output", "out"], "quire: --output goes with --input"),
        (["--chat", "x", "--ordered"], "quire: --ordered goes with --input"),
        (["--input", "none", "--output", "out"], "quire: cannot read none: No such file"),
        (["--input", "in", "--output", "no/out"], "quire: cannot write no/out: the folder no does"),
        (["--input", "in", "--output", "out", "--temperature", "3"], "quire: temperature must be"),
        (["--input", "in", "--output", "out", "--page-size", "3"], "quire: page_size must be a"),
    ],
)
def test_wrong_use_is_one_line_and_loads_nothing_heavy(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    write_lines(tmp_path / "in", many(1))
    code = (
        "import sys; from quire.serving.cli import main; code = main(sys.argv[1:])\n"
        "assert not {'jax', 'numpy', 'transformers', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "generate", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_input_excludes_the_other_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generate", "--prompt", "x", "--input", "in", "--output", "out"])
    assert "argument --input: not allowed with argument --prompt" in capsys.readouterr().err


def test_stdin_to_stdout_with_what_is_said_on_stderr() -> None:
    lines = "".join(json.dumps(line) + "\n" for line in [*many(3), {"id": "bad"}])
    flags = [*FLAGS, "--ordered", "--max-tokens", "3", "--ignore-eos"]
    with child("--input", "-", "--output", "-", *flags, stdin=subprocess.PIPE) as process:
        out, err = process.communicate(lines, timeout=120)
    assert process.returncode == 1
    results = [json.loads(line) for line in out.splitlines()]
    assert [r["id"] for r in results] == ["r0", "r1", "r2", "bad"]
    assert [len(r["outputs"][0]["token_ids"]) for r in results[:3]] == [3, 3, 3]
    assert "quire: 4 lines done, 1 errors, 0 skipped" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_run_that_was_stopped_goes_on_where_it_was(
    llm: LLM, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    lines = many(300, ignore_eos=True, max_tokens=8)
    source, target = write_lines(tmp_path / "in", lines), tmp_path / "out"
    with child("--input", source, "--output", str(target), *FLAGS) as process:
        err = stop_at(process, target, 20, number)
    assert process.returncode == code
    stopped_at = num_lines(target)
    assert 20 <= stopped_at < 300
    if code > 0:
        assert len(results_in(target)) == stopped_at
        assert err.splitlines()[-1] == (
            f"quire: interrupted; {stopped_at} results are complete; run the same command again "
            "to go on"
        )
        assert "Traceback" not in err
    assert run(llm, source, target) == 0
    assert run(llm, source, tmp_path / "whole") == 0
    assert answers(results_in(target)) == answers(results_in(tmp_path / "whole"))


def test_file_size_limit_is_one_line_and_the_next_run_goes_on(llm: LLM, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in", many(60, ignore_eos=True, max_tokens=4))
    target = tmp_path / "out"
    arguments = ["--input", source, "--output", str(target), *FLAGS]
    with child(*arguments, limit_bytes=5000) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    done = results_in(target)  # the line that did not fit is gone
    assert 0 < len(done) < 60
    assert err.splitlines()[-1] == (
        f"quire: cannot write {target}: File too large; {len(done)} results are complete; raise "
        "the limit on file sizes and run the same command again to go on"
    )
    assert "Traceback" not in err
    assert run(llm, source, target) == 0
    assert len(answers(results_in(target))) == 60


def test_second_run_on_the_same_output_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in", many(300, ignore_eos=True, max_tokens=8))
    target = tmp_path / "out"
    arguments = ["--input", source, "--output", str(target), *FLAGS]
    with child(*arguments) as process:
        while num_lines(target) < 1:
            assert process.poll() is None
        assert cli.main(["generate", *arguments]) == 2
        process.kill()
        process.communicate()
    assert f"quire: another run is writing {target}; wait for" in capsys.readouterr().err


@pytest.mark.slow
def test_run_killed_at_random_moments_ends_complete(llm: LLM, tmp_path: Path) -> None:
    rng = random.Random(7)
    lines: list[Any] = many(10_000, ignore_eos=True, max_tokens=4)
    for bad in rng.sample(range(10_000), 20):
        lines[bad] = "nonsense"
    source, target = write_lines(tmp_path / "in", lines), tmp_path / "out"
    for _ in range(6):
        with child("--input", source, "--output", str(target), *FLAGS) as process:
            stop_at(process, target, num_lines(target) + rng.randint(1, 1500), signal.SIGKILL)
        # What a power cut could leave of a line in the middle of being written.
        with target.open("ab") as torn:
            torn.write(b'{"id": "r1999", "index": 19'[: rng.randint(0, 27)])
    assert run(llm, source, target) == 1
    assert run(llm, source, tmp_path / "whole") == 1
    assert len(results_in(target)) == 10_000
    assert answers(results_in(target)) == answers(results_in(tmp_path / "whole"))


def resident_bytes(process: subprocess.Popen[str]) -> int:
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--ordered"]])
def test_memory_is_flat_over_ten_thousand_lines(tmp_path: Path, flags: list[str]) -> None:
    """Each id is 2 KiB, so that keeping every request or every result costs 15 MiB and more from
    30 % to the end. Measured: 2 to 4 MiB, 0.8 of them digests of 7,000 ids; the bound leaves room
    for the allocator.
    """
    padding = "and so on, " * 200
    lines = [{"id": f"{i}-{padding}", "prompt_token_ids": [i % 500, 7, 9]} for i in range(10_000)]
    source, target = write_lines(tmp_path / "in", lines), tmp_path / "out"
    arguments = ["--input", source, "--output", str(target), "--max-tokens", "4", *flags]
    with child(*arguments, "--ignore-eos", stderr=subprocess.DEVNULL) as process:
        resident = []
        for share in (0.3, 0.99):
            while num_lines(target) < share * 10_000:
                assert process.poll() is None
            resident.append(resident_bytes(process))
        process.communicate(timeout=60)
    assert process.returncode == 0
    print(*(f"{r / 2**20:.1f} MiB" for r in resident))
    assert resident[1] - resident[0] < 8 << 20
    assert len(answers(results_in(target))) == 10_000
