"""`quire generate --input` over one engine: answers, errors, order, windows, going on."""

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from quire import LLM, SamplingParams
from quire.engine.errors import ConfigError, EngineStopped, RequestError
from quire.serving.batch.command import run_batch
from quire.serving.batch.result_file import BatchStopped
from quire.serving.batch.run import BatchRun

from .batch_runs import OPTIONS, answers, many, num_lines, results_in, run, write_lines

TALK = [{"role": "user", "content": "What is 2 + 2?"}]
GREEDY = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**OPTIONS) as llm:
        yield llm


def no_engine() -> Any:
    raise AssertionError("the engine was started")


def test_every_kind_of_line_is_answered(llm: LLM, tmp_path: Path) -> None:
    ids = llm.tokenize("Hello")
    completion = {"prompt": "Hello", **GREEDY, "model": "theirs", "logprobs": 1}
    lines: list[Any] = [
        {"id": "text", "prompt": "Hello", **GREEDY},
        {"prompt_token_ids": ids, **GREEDY, "prompt_logprobs": 0},
        "   ",
        {"id": 7, "messages": TALK, **GREEDY},
        {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": completion},
        {"custom_id": "d", "url": "/v1/chat/completions", "body": {"messages": TALK, "seed": 1}},
        {"id": "two", "prompt": "Hello", "n": 2, "max_tokens": 3, "ignore_eos": True},
    ]
    target = tmp_path / "out"
    assert run(llm, write_lines(tmp_path / "in", lines), target) == 0
    by_id = {r["id"]: r for r in results_in(target)}
    assert {i: r["index"] for i, r in by_id.items()} == {
        "text": 0, "line-2": 1, 7: 3, "c": 4, "d": 5, "two": 6,
    }  # fmt: skip
    assert all(r["error"] is None for r in by_id.values())
    params = SamplingParams(**GREEDY)
    text = llm.generate("Hello", params, use_tqdm=False)[0]
    chat = llm.chat(TALK, params, use_tqdm=False)[0]
    expected = {"text": text, "line-2": text, 7: chat, "c": text}
    for line_id, output in expected.items():
        (answer,) = by_id[line_id]["outputs"]
        assert answer["text"] == output.outputs[0].text
        assert answer["token_ids"] == output.outputs[0].token_ids
        usage = by_id[line_id]["usage"]
        assert usage["prompt_tokens"] == len(output.prompt_token_ids)
        assert (usage["completion_tokens"], usage["total_tokens"]) == (
            4, usage["prompt_tokens"] + 4,
        )  # fmt: skip
    assert set(by_id["text"]["outputs"][0]) == {
        "index", "text", "token_ids", "finish_reason", "stop_reason",
    }  # fmt: skip
    (answer,) = by_id["c"]["outputs"]
    assert by_id["c"]["model"] == "theirs"
    assert [position[0]["token_id"] for position in answer["logprobs"]] == answer["token_ids"]
    total = sum(position[0]["logprob"] for position in answer["logprobs"])
    assert total == pytest.approx(answer["cumulative_logprob"])
    assert [p and p[0]["token_id"] for p in by_id["line-2"]["prompt_logprobs"]] == [None, *ids[1:]]
    # A chat of OpenAI's may use the whole context, ours has SamplingParams' 16.
    (long,) = by_id["d"]["outputs"]
    assert long["finish_reason"] == "stop" or by_id["d"]["usage"]["total_tokens"] == 256
    assert [a["index"] for a in by_id["two"]["outputs"]] == [0, 1]


def test_fields_of_a_line_win_over_flags(llm: LLM, tmp_path: Path) -> None:
    chat = {"messages": TALK, "ignore_eos": True}
    lines = [
        {"prompt": "Hello"},
        {"prompt": "Hello", "max_tokens": 2},
        {"custom_id": "c", "url": "/v1/chat/completions", "body": chat},
    ]
    source = write_lines(tmp_path / "in", lines)
    sampling = {"max_tokens": 5, "ignore_eos": True}
    assert run(llm, source, tmp_path / "out", sampling=sampling, is_ordered=True) == 0
    results = results_in(tmp_path / "out")
    assert [len(r["outputs"][0]["token_ids"]) for r in results] == [5, 2, 5]


def test_bad_lines_are_errors_and_the_rest_is_done(llm: LLM, tmp_path: Path) -> None:
    chat = {"custom_id": "o", "url": "/v1/chat/completions"}
    lines: list[Any] = [
        {"id": "a", "prompt": "Hello", **GREEDY},
        b'{"id": "b", "prompt": "\xff"}',
        "nonsense",
        {"id": "a", "prompt": "again"},
        {"id": "e", "prompt": "Hello", "temperature": 3},
        {"id": "f", "prompt": "word " * 300},
        {"id": "g", "messages": [{"role": "pirate", "content": "x"}]},
        {"id": "h", "prompt": "", **GREEDY},
        {"id": "i", "prompt_token_ids": [1, 10**6]},
        chat | {"body": {"messages": TALK, "max_completion_tokens": 0}},
        {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x"}},
        {"id": "z", "prompt": "Hello", **GREEDY},
    ]
    target = tmp_path / "out"
    assert run(llm, write_lines(tmp_path / "in", lines), target, is_ordered=True) == 1
    results = results_in(target)
    assert [r["index"] for r in results] == list(range(12))
    errors = {r["id"]: r["error"] for r in results}
    assert errors.pop("a") is None
    assert errors.pop("z") is None
    expected = {
        "line-2": (2, "the line is not UTF-8", None),
        "line-3": (3, "the line is not JSON", None),
        "a#line-4": (4, "line 1 has the id 'a' already; give each line its own", "id"),
        "e": (5, "temperature must be a number from 0 (greedy) to 2, got 3", "temperature"),
        "f": (6, "tokens, but the context is 256", "prompt_token_ids"),
        "g": (7, "knows the roles system, user, assistant and tool", "messages"),
        "h": (8, "the prompt is empty", "prompt"),
        "i": (9, "prompt_token_ids[1] is 1000000", "prompt_token_ids"),
        "o": (10, "max_completion_tokens must be an integer, 1 or more", "max_completion_tokens"),
        "a#line-11": (11, "line 1 has the custom_id 'a' already", "custom_id"),
    }
    assert errors.keys() == expected.keys()
    for line_id, (line, message, field) in expected.items():
        assert message in errors[line_id]["message"]
        kind = "ContextExceeded" if line_id == "f" else "RequestError"
        assert (errors[line_id]["line"], errors[line_id]["type"]) == (line, kind)
        assert errors[line_id]["field"] == field or line_id == "g"


def test_tools_that_the_template_leaves_out_are_refused(llm: LLM, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    try:
        llm.get_tokenizer().apply_chat_template(talk, tools=tools)
        is_written = True
    except RequestError:
        is_written = False
    lines = [{"messages": talk, "tools": tools, **GREEDY}]
    assert run(llm, write_lines(tmp_path / "in", lines), tmp_path / "out") == int(not is_written)
    (result,) = results_in(tmp_path / "out")
    if not is_written:
        assert result["error"]["field"] == "tools"
        assert "template does not write them" in result["error"]["message"]


def test_answers_are_those_of_generate_in_any_order(llm: LLM, tmp_path: Path) -> None:
    lines = many(12, ignore_eos=True, temperature=1)
    source = write_lines(tmp_path / "in", lines)
    assert run(llm, source, tmp_path / "out") == 0
    with LLM(**OPTIONS) as fresh:  # its requests are counted from 0
        params = SamplingParams(ignore_eos=True, temperature=1)
        outputs = fresh.generate([x["prompt"] for x in lines], params, use_tqdm=False)
    by_index = {r["index"]: r["outputs"][0]["token_ids"] for r in results_in(tmp_path / "out")}
    assert by_index == {i: o.outputs[0].token_ids for i, o in enumerate(outputs)}
    assert len({tuple(ids) for ids in by_index.values()}) == 12


def test_resumed_run_gives_the_answers_of_an_uninterrupted_one(
    llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[Any] = many(40, ignore_eos=True, max_tokens=6)
    lines[5] = "nonsense"
    lines[9] = lines[8]  # a duplicate
    source = write_lines(tmp_path / "in", lines)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run(llm, source, whole) == 1
    written = whole.read_bytes().splitlines(keepends=True)
    resumed.write_bytes(b"".join(written[::2]) + written[1][:30])
    assert run(llm, source, resumed) == 1
    said = capsys.readouterr().err
    assert f"quire: {resumed} has 20 results; going on from there" in said
    assert f"quire: cut 30 bytes of an unfinished line off {resumed}" in said
    assert "quire: 20 lines done, " in said
    assert answers(results_in(resumed)) == answers(results_in(whole))
    before = resumed.read_bytes()
    # Nothing is left to do: no engine, and the same exit code.
    assert run_batch(source, str(resumed), no_engine, sampling={}) == 1
    assert "40 skipped (already done, 2 of them errors)" in capsys.readouterr().err
    assert resumed.read_bytes() == before


def test_results_of_another_input_stop_the_run(llm: LLM, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert run(llm, write_lines(tmp_path / "in", many(4, **GREEDY)), target) == 0
    before = target.read_bytes()
    other = write_lines(tmp_path / "other", [{"id": "new", "prompt": "x"}, *many(4, **GREEDY)])
    with pytest.raises(ConfigError, match="does not belong to this input: line 1 has the id 'new'"):
        run(llm, other, target)
    assert target.read_bytes() == before


def test_ordered_results_are_in_order_and_the_buffer_is_bounded(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[Any] = many(150, temperature=0, ignore_eos=True, max_tokens=2)
    lines[0]["max_tokens"] = 150
    lines[60] = "nonsense"
    most = 0
    admit = BatchRun._admit

    def counted(self: BatchRun, *arguments: Any) -> None:
        nonlocal most
        admit(self, *arguments)
        assert self._open is not None
        most = max(most, self._open.num_open + self._order.num_held)

    monkeypatch.setattr(BatchRun, "_admit", counted)
    source = write_lines(tmp_path / "in", lines)
    assert run(llm, source, tmp_path / "ordered", is_ordered=True) == 1
    assert [r["index"] for r in results_in(tmp_path / "ordered")] == list(range(150))
    assert most == 4 * 8
    assert run(llm, source, tmp_path / "free") == 1
    free = results_in(tmp_path / "free")
    assert free[0]["index"] != 0
    assert answers(free) == answers(results_in(tmp_path / "ordered"))
    with pytest.raises(ConfigError, match="was not written in order, so --ordered cannot go on"):
        run(llm, source, tmp_path / "free", is_ordered=True)


def test_reader_does_not_run_ahead_and_answers_do_not_wait_for_it(llm: LLM, tmp_path: Path) -> None:
    """A producer that waits for the answer to its first line before it writes the second."""
    target = tmp_path / "out"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    seen: list[int] = []

    def produce() -> None:
        with open(pipe, "wb", buffering=0) as lines:
            for number, line in enumerate(many(3, **GREEDY), 1):
                lines.write(json.dumps(line).encode() + b"\n")
                deadline = time.monotonic() + 30
                while num_lines(target) < number and time.monotonic() < deadline:
                    os.sched_yield()
                seen.append(num_lines(target))

    producer = threading.Thread(target=produce)
    producer.start()
    assert run(llm, str(pipe), target) == 0
    producer.join()
    assert seen == [1, 2, 3]


def test_failure_of_our_own_in_one_line_ends_that_line(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = LLM.check

    def fail_on_second(self: LLM, prompt: Any, params: SamplingParams) -> Any:
        if "1 + 2" in str(prompt):
            raise TypeError("made to fail")
        return check(self, prompt, params)

    monkeypatch.setattr(LLM, "check", fail_on_second)
    source = write_lines(tmp_path / "in", many(3, **GREEDY))
    assert run(llm, source, tmp_path / "out", is_ordered=True) == 1
    errors = [r["error"] for r in results_in(tmp_path / "out")]
    assert errors[0] is errors[2] is None
    assert (errors[1]["message"], errors[1]["type"]) == ("made to fail", "TypeError")


def test_request_that_the_engine_gives_up_is_an_error_of_its_line(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = llm._engine.core
    forward = core.runner.forward

    def fail_with_bad(packed: Any, num_tokens: int) -> Any:
        if any(list(c.request.prompt_token_ids) == [5, 6] for c in core._last_plan.chunks):
            raise RuntimeError("made to fail")
        return forward(packed, num_tokens)

    monkeypatch.setattr(core.runner, "forward", fail_with_bad)
    lines = [{"id": "bad", "prompt_token_ids": [5, 6]}]
    assert run(llm, write_lines(tmp_path / "in", lines), tmp_path / "out") == 1
    (result,) = results_in(tmp_path / "out")
    assert result["outputs"][0]["finish_reason"] == "error"
    why = "its steps failed 2 times; the engine's log says why"
    assert result["error"]["message"] == why
    assert (result["error"]["type"], result["error"]["line"]) == ("EngineError", 1)


def test_engine_that_dies_leaves_unfinished_lines_to_the_next_run(llm: LLM, tmp_path: Path) -> None:
    lines = many(60, ignore_eos=True, max_tokens=20)
    source, target = write_lines(tmp_path / "in", lines), tmp_path / "out"
    with LLM(**OPTIONS) as dying:
        runner = dying._engine.core.runner
        forward = runner.forward
        steps = iter(range(60))

        def fail_late(packed: Any, num_tokens: int) -> Any:
            next(steps)  # StopIteration is as good a failure as any
            return forward(packed, num_tokens)

        def no_memory() -> None:
            raise MemoryError("made to fail")

        runner.forward = fail_late  # type: ignore[method-assign]
        runner.allocate = no_memory  # type: ignore[method-assign]
        with pytest.raises(
            BatchStopped, match=r"^the engine has failed \(made to fail\); \d+ resul"
        ):
            run(dying, source, target)
    done = results_in(target)
    assert 0 < len(done) < 60
    assert all(r["error"] is None for r in done)
    assert run(llm, source, target) == 0
    assert run(llm, source, tmp_path / "whole") == 0
    assert answers(results_in(target)) == answers(results_in(tmp_path / "whole"))


def test_closed_engine_stops_the_run(tmp_path: Path) -> None:
    llm = LLM(**OPTIONS)
    llm.close()
    source = write_lines(tmp_path / "in", many(2))
    with pytest.raises(BatchStopped, match=r"^the engine was closed; 0 results are complete; run"):
        run(llm, source, tmp_path / "out")
    with pytest.raises(EngineStopped), llm.open_requests() as under_way:
        under_way.require_engine()


def test_full_device_is_one_error(llm: LLM, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in", many(2, **GREEDY))
    with pytest.raises(BatchStopped) as caught:
        run(llm, source, Path("/dev/full"))
    assert str(caught.value) == (
        "cannot write /dev/full: No space left on device; 0 results are complete"
    )


def test_files_are_checked_before_the_engine_is_started(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in", many(2))
    (tmp_path / "link").hardlink_to(source)
    cases = [
        (str(tmp_path / "none"), "out", "cannot read .*none: No such file or directory; give the"),
        (str(tmp_path), "out", "cannot read .*: it is a folder; give a file of requests"),
        (source, "", "cannot write .*: Is a directory"),
        (source, "no/out", "the folder .*no does not exist; make it, or give another --output"),
        (source, "in", "the input and .*in are the same file; give another --output"),
        (source, "link", "the input and .*link are the same file; give another --output"),
    ]
    for given, target, message in cases:
        with pytest.raises(ConfigError, match=message):
            run_batch(given, str(tmp_path / target), no_engine, sampling={})
    empty = write_lines(tmp_path / "empty", [])
    Path(empty).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"the input and .*empty are the same file"):
        run_batch(empty, empty, no_engine, sampling={})
    assert run_batch(empty, str(tmp_path / "out"), no_engine, sampling={}) == 0
