"""What a run may do to an output that holds something, and whose line a result is. No engine: every
line that is left to do is a wrong one, whose result is an error.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from quire.engine.errors import ConfigError, RequestError
from quire.serving.batch import unfinished
from quire.serving.batch.command import run_batch
from quire.serving.batch.finished import Finished
from quire.serving.batch.interrupts import Interrupts
from quire.serving.batch.line_reader import count_lines
from quire.serving.batch.progress import Progress
from quire.serving.batch.result_file import ResultFile
from quire.serving.batch.result_line import Origin, refused

from .batch_runs import results_in, write_lines


def no_engine() -> Any:
    raise AssertionError("the engine was started")


def run(source: str, target: Path, **options: Any) -> int:
    return run_batch(source, str(target), no_engine, **{"sampling": {}} | options)


def error_of(line_id: Any, line: int) -> bytes:
    return refused(Origin(line_id, line), RequestError("no")).content


def wrong(*line_ids: str) -> list[Any]:
    return [{"id": line_id} for line_id in line_ids]


def pipe_of(*lines: Any) -> str:
    """A pipe that holds the lines and is at its end after them."""
    read_end, write_end = os.pipe()
    os.write(write_end, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    os.close(write_end)
    return f"/dev/fd/{read_end}"


def close_pipe(path: str) -> None:
    os.close(int(path.rpartition("/")[2]))


@pytest.mark.parametrize("line", ['{"id": 1, "prompt": "hello",}', '{"id": "a", "prompt": "b"}'])
def test_input_as_the_output_stays_as_it_is(tmp_path: Path, line: str) -> None:
    """A wrong line that began like a result was cut off as a torn one, before the two files were
    compared: the user's input was emptied.
    """
    source = write_lines(tmp_path / "in", [line])
    with pytest.raises(ConfigError, match=r"the input and .*in are the same file; give another"):
        run(source, tmp_path / "in")
    assert (tmp_path / "in").read_text() == f"{line}\n"


def test_refused_run_leaves_the_output_of_another_input_alone(tmp_path: Path) -> None:
    """Results come as they finish: the output may hold those of line 4 only. Another input's run
    wrote its lines 1 to 3 there before it met the fourth.
    """
    target = tmp_path / "out"
    write_lines(target, [error_of("r3", 4)])
    before = target.read_bytes()
    other = wrong("a", "b", "c", "d", "e", "f")
    with pytest.raises(ConfigError, match="does not belong to this input: line 4 has the id 'd'"):
        run(write_lines(tmp_path / "in", other), target)
    pipe = pipe_of(*other)
    with pytest.raises(ConfigError, match="does not belong to this input: line 4 has the id 'd'"):
        run(pipe, target)
    close_pipe(pipe)
    assert target.read_bytes() == before


@pytest.mark.parametrize("last", ["d", "gone"])
def test_pipe_goes_on_with_an_output(tmp_path: Path, last: str) -> None:
    """Its lines are held until those of the results have come, or its end."""
    target = tmp_path / "out"
    index = 3 if last == "d" else 9
    write_lines(target, [error_of(last, index + 1)])
    pipe = pipe_of(*wrong("a", "b", "c", "d", "e"))
    assert run(pipe, target) == 1
    close_pipe(pipe)
    indexes = [r["index"] for r in results_in(target)]
    assert indexes == ([3, 0, 1, 2, 4] if last == "d" else [9, 0, 1, 2, 3, 4])


def test_pipe_with_too_much_before_the_results_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "_MAX_HELD_BYTES", 2500)
    target = tmp_path / "out"
    write_lines(target, [error_of("d", 4)])
    before = target.read_bytes()
    pipe = pipe_of(*wrong("a", "b", "c", "d"))
    with pytest.raises(ConfigError, match="a pipe's lines are held until then; give the input as"):
        run(pipe, target)
    close_pipe(pipe)
    assert target.read_bytes() == before


def test_ordered_says_that_a_line_in_the_middle_is_missing(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in", wrong("a", "b", "c"))
    target = tmp_path / "out"
    write_lines(target, [error_of("a", 1), error_of("c", 3)])
    message = r"has no result of line 2 in the middle, and has later ones, so --ordered cannot go"
    with pytest.raises(ConfigError, match=message):
        run(source, target, is_ordered=True)
    assert run(source, target) == 1
    assert [r["index"] for r in results_in(target)] == [0, 2, 1]


@pytest.mark.parametrize("before", ["nonsense", '{"id": "a", "prompt": "b"'])
def test_mended_line_is_not_another_input(tmp_path: Path, before: str) -> None:
    target = tmp_path / "out"
    assert run(write_lines(tmp_path / "in", [before, *wrong("b")]), target) == 1
    mended = write_lines(tmp_path / "in", wrong("a", "b"))
    message = r"line 1 of the input has an error in .*out, and another id since; take that error's"
    with pytest.raises(ConfigError, match=message):
        run(mended, target)
    write_lines(target, target.read_bytes().splitlines()[1:])
    assert run(mended, target) == 1
    assert [r["id"] for r in results_in(target)] == ["b", "a"]


def claims(finished: Finished, line_ids: list[str | None]) -> list[tuple[Any, int | None]]:
    claimed = [finished.claim(line_id, line) for line, line_id in enumerate(line_ids, 1)]
    return [(claim.origin.id, claim.first_line) for claim in claimed]


@pytest.mark.parametrize(
    ("line_ids", "expected"),
    [
        (["line-2", None], [("line-2", None), ("line-2#line-2", None)]),
        ([None, "line-1"], [("line-1", None), ("line-1#line-2", None)]),
        (
            [None, "line-1", "line-1"],
            [("line-1", None), ("line-1#line-2", None), ("line-1#line-3", 2)],
        ),
        (["a", "a", "a#line-2"], [("a", None), ("a#line-2", 1), ("a#line-2#line-3", None)]),
        (["line-1", "line-1"], [("line-1", None), ("line-1#line-2", 1)]),
        (["b#line-1", "b#line-1"], [("b#line-1", None), ("b#line-1#line-2", 1)]),
    ],
)
def test_only_an_id_that_a_line_gave_can_be_given_twice(
    line_ids: list[str | None], expected: list[tuple[str, int | None]]
) -> None:
    assert claims(Finished("out"), line_ids) == expected


def test_made_up_ids_are_the_same_in_a_run_that_goes_on() -> None:
    rng = random.Random(3)
    names = [
        None,
        "a",
        "a#line-2",
        "line-1",
        "line-2",
        "line-3",
        "a#line-2#line-3",
        "line-1#line-2",
    ]
    for _ in range(2000):
        line_ids = [rng.choice(names) for _ in range(rng.randint(1, 7))]
        whole = claims(Finished("out"), line_ids)
        assert len({line_id for line_id, _ in whole}) == len(line_ids)
        finished = Finished("out")
        kept = [i for i in range(len(line_ids)) if rng.random() < 0.5]
        rng.shuffle(kept)
        for index in kept:
            assert finished.add(whole[index][0], index, is_error=False)
        for _ in range(2):  # to look at the file, and to do what is left
            assert finished.num_unmet == len(kept)
            assert claims(finished, line_ids) == whole
            assert finished.num_unmet == 0
            finished.rewind()


@pytest.mark.parametrize(("line_ids", "code"), [(["a"], 1), (["a", "b"], 143)])
def test_signal_during_the_last_step_leaves_a_run_that_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_ids: list[str], code: int
) -> None:
    append = ResultFile.append

    def interrupted(self: ResultFile, *arguments: Any) -> None:
        append(self, *arguments)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ResultFile, "append", interrupted)
    assert run(write_lines(tmp_path / "in", wrong(*line_ids)), tmp_path / "out") == code
    assert [r["id"] for r in results_in(tmp_path / "out")] == ["a"]


def test_signal_just_before_a_long_call_prevents_it() -> None:
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt), interrupts.raised():
            pytest.fail("the call was made")


def test_lines_of_a_file_that_cannot_be_read_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    source = write_lines(tmp_path / "in", wrong("a"))
    monkeypatch.setattr(os, "pread", failing)
    with open(source, "rb") as lines:
        assert count_lines(lines.fileno()) is None


def test_progress_is_not_said_into_a_closed_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(4)
    monkeypatch.setattr(sys, "stderr", None)
    progress.start_clock()
    progress._said_s -= 60.0
    progress.tick(7)
    assert capsys.readouterr().out == ""
