"""What a line of the input may be, and how lines are read and claimed. No engine."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from quire.engine.errors import ConfigError, RequestError
from quire.serving.batch.finished import Finished
from quire.serving.batch.line_reader import Line, LineReader, count_lines
from quire.serving.batch.line_request import LineRequest
from quire.serving.batch.read_line import read_line
from quire.serving.batch.result_file import ResultFile, open_results
from quire.serving.batch.result_line import Origin, Result, Usage, refused

CHAT_URL = "/v1/chat/completions"
TALK = [{"role": "user", "content": "Hi"}]


def file_of(tmp_path: Path, content: bytes) -> int:
    path = tmp_path / "lines"
    path.write_bytes(content)
    return os.open(path, os.O_RDONLY)


def lines_of(tmp_path: Path, content: bytes, max_line_bytes: int = 100) -> list[bytes | None]:
    descriptor = file_of(tmp_path, content)
    reader = LineReader(descriptor, max_line_bytes)
    lines: list[Line] = []
    while not reader.is_at_end:
        line = reader.read(0.0)
        if line is not None:
            lines.append(line)
    os.close(descriptor)
    assert [line.number for line in lines] == list(range(1, len(lines) + 1))
    return [line.content for line in lines]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"a\nb\n", [b"a", b"b"]),
        (b"a\n\nb", [b"a", b"", b"b"]),
        (b"\xef\xbb\xbfa\r\nb", [b"a\r", b"b"]),
        (b"x" * 100 + b"\n" + b"x" * 101 + b"\nb\n", [b"x" * 100, None, b"b"]),
        (b"a\n" + b"x" * 300_000 + b"\nb", [b"a", None, b"b"]),
        (b"a\n" + b"x" * 300_000, [b"a", None]),
        (b"a\n" * 100_000, [b"a"] * 100_000),
    ],
)
def test_reader_gives_lines_and_drops_those_too_long(
    tmp_path: Path, content: bytes, expected: list[bytes | None]
) -> None:
    assert lines_of(tmp_path, content) == expected
    assert count_lines(file_of(tmp_path, content)) == len(expected)


def test_reader_holds_no_more_than_a_line_and_a_chunk(tmp_path: Path) -> None:
    descriptor = file_of(tmp_path, b"x" * 5_000_000 + b"\n")
    reader = LineReader(descriptor, 1000)
    most = 0
    held = reader._held
    while not reader.is_at_end:
        reader._fill() if not reader._is_drained else None
        most = max(most, len(held))
        reader.read(0.0)
    os.close(descriptor)
    assert most <= 1000 + (1 << 16)


def test_reader_does_not_wait_for_a_pipe_without_data() -> None:
    read_end, write_end = os.pipe()
    reader = LineReader(read_end)
    assert reader.read(0.0) is None
    os.write(write_end, b"a\nb")
    assert reader.read(0.0) == Line(1, b"a")
    assert reader.read(0.0) is None
    assert not reader.is_at_end
    os.close(write_end)
    assert reader.read(0.0) == Line(2, b"b")
    assert reader.is_at_end
    assert count_lines(read_end) is None
    os.close(read_end)


def asked(fields: Any) -> LineRequest:
    content = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    read = read_line(Line(1, content))
    assert isinstance(read.asked, LineRequest), read.asked
    return read.asked


def error_of(fields: Any) -> tuple[str, str | None]:
    content = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    read = read_line(Line(1, content))
    assert isinstance(read.asked, RequestError)
    return str(read.asked), read.asked.field


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "\xff"}', "the line is not UTF-8 at byte 12; save"),
        (b"nonsense", "the line is not JSON: Expecting value at character 0"),
        (b'{"prompt": "a"} {}', "the line is not JSON: Extra data at character 16"),
        (b"[1, 2]", "the line must be a JSON object, got a list"),
        (b"null", "the line must be a JSON object, got null"),
        (b'{"prompt": "a", "top_p": NaN}', "NaN is not a JSON number"),
        (b'{"prompt": "a", "top_p": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"prompt": "a", "top_p": 1e999}', "the number 1e999 is too large"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "an integer of thousands of digits"),
        (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' stands twice in one object"),
        (b'{"prompt": ' + b"[" * 200 + b"]" * 200 + b"}", "nested deeper than 128 levels"),
        (b'{"prompt": ' + b"[" * 10**6, "nested deeper than 128 levels"),
    ],
)
def test_line_that_is_not_strict_json_is_an_error(content: bytes, message: str) -> None:
    assert message in error_of(content)[0]


def test_line_nested_to_the_limit_is_read() -> None:
    deep = b'{"prompt_token_ids": ' + b"[" * 127 + b"]" * 127 + b"}"
    assert asked(deep).prompt is not None
    assert "deeper than 128" in error_of(deep.replace(b"[]", b"[[]]"))[0]


@pytest.mark.parametrize(
    ("fields", "message", "field"),
    [
        ({"id": "a"}, "one of prompt, prompt_token_ids, messages, this one has none", "prompt"),
        (
            {"prompt": "a", "messages": TALK},
            "this one has prompt and messages",
            "messages",
        ),
        ({"promt": "a"}, "promt is not a field of a line; did you mean prompt?", "promt"),
        ({"prompt": "a", "temprature": 1}, "did you mean temperature?", "temprature"),
        ({"prompt": "a", "max_new_tokens": 1}, "here it is called max_tokens", "max_new_tokens"),
        ({"prompt": "a", "best_of": 2}, "best_of is not honoured", "best_of"),
        ({"prompt": "a", "cls": 1}, "cls is not a sampling parameter", "cls"),
        ({"prompt": "a", "self": 1}, "self is not a sampling parameter", "self"),
        ({"prompt": "a", "user": "u"}, "user is not a sampling parameter", "user"),
        ({"prompt": 3}, "prompt must be a string (token ids go into", "prompt"),
        ({"prompt_token_ids": "a"}, "must be a list of token ids, got str", "prompt_token_ids"),
        ({"id": [1], "prompt": "a"}, "id must be a string or a whole number, got list", "id"),
        ({"id": True, "prompt": "a"}, "id must be a string or a whole number, got bool", "id"),
        ({"prompt": "a", "tools": []}, "tools goes into a chat template, so it needs", "tools"),
        (
            {"messages": TALK, "chat_template_kwargs": {"tools": []}},
            "chat_template_kwargs may not set tools",
            "chat_template_kwargs",
        ),
        (
            {"messages": TALK, "chat_template_kwargs": 1},
            "chat_template_kwargs must be an object, got int",
            "chat_template_kwargs",
        ),
        (
            {"prompt": "a", "logit_bias": {"x": 1}},
            "logit_bias has the key 'x'; keys are token ids",
            "logit_bias",
        ),
    ],
)
def test_native_line_is_refused_by_field(fields: Any, message: str, field: str) -> None:
    said, named = error_of(fields)
    assert message in said
    assert named == field


def test_native_line_keeps_what_it_says() -> None:
    request = asked({"prompt": "a", "messages": None, "seed": 3, "logit_bias": {"17": 2.5}})
    assert request.prompt == {"prompt": "a"}
    assert request.sampling == {"seed": 3, "logit_bias": {17: 2.5}}
    chat = asked({"messages": TALK, "tools": [{}], "chat_template_kwargs": {"who": "me"}})
    assert (chat.messages, chat.tools) == (TALK, [{}])
    assert chat.chat_template_kwargs == {"who": "me"}


def chat_line(**body: Any) -> dict[str, Any]:
    return {
        "custom_id": "a", "method": "POST", "url": CHAT_URL, "body": {"messages": TALK} | body,
    }  # fmt: skip


def completion_line(**body: Any) -> dict[str, Any]:
    return {"custom_id": "a", "url": "/v1/completions", "body": body}


@pytest.mark.parametrize(
    ("fields", "message", "field"),
    [
        ({"custom_id": "a", "prompt": "b"}, "prompt stands beside custom_id, method", "prompt"),
        (chat_line() | {"method": "GET"}, "method must be \"POST\", got 'GET'", "method"),
        (chat_line() | {"url": "/v1/embeddings"}, "url must be /v1/chat/completions or", "url"),
        (chat_line() | {"body": []}, "body must be an object with the request, got list", "body"),
        (chat_line(stream=True), "stream must be false or absent", "stream"),
        (chat_line(model=3), "model must be a string, got 3", "model"),
        (chat_line(user="u"), "user is not honoured; leave it out", "user"),
        (chat_line(response_format={}), "response_format is not honoured", "response_format"),
        (chat_line(tool_choice="required"), 'tool_choice must be "auto" or "none"', "tool_choice"),
        (
            chat_line(max_tokens=1, max_completion_tokens=1),
            "max_tokens and max_completion_tokens are the same",
            "max_tokens",
        ),
        (chat_line(logprobs=3), "logprobs must be true or false in a chat, got 3", "logprobs"),
        (chat_line(top_logprobs=3), "top_logprobs needs logprobs to be true", "top_logprobs"),
        (
            chat_line(logprobs=True, top_logprobs="3"),
            "top_logprobs must be a whole number",
            "top_logprobs",
        ),
        (chat_line(temprature=1), "did you mean temperature?", "temprature"),
        (completion_line(), "prompt must be a string or a list of token ids", "prompt"),
        (
            completion_line(prompt="a", max_completion_tokens=1),
            "here it is called max_tokens",
            "max_completion_tokens",
        ),
    ],
)
def test_openai_line_is_refused_by_field(fields: Any, message: str, field: str) -> None:
    said, named = error_of(fields)
    assert message in said
    assert named == field


def test_openai_chat_has_openais_names_and_defaults() -> None:
    request = asked(
        chat_line(
            model="m", max_completion_tokens=5, temperature=None, top_k=3, logprobs=True,
            top_logprobs=2, tools=[{}], tool_choice="none", stream=False,
        )
    )  # fmt: skip
    assert request.sampling == {"max_tokens": 5, "top_k": 3, "logprobs": 2}
    assert request.tools is None
    assert request.echo == {"model": "m"}
    plain = asked(chat_line(tools=[{}]))
    assert plain.defaults == {"max_tokens": None}
    assert (plain.tools, plain.sampling) == ([{}], {"logprobs": None})
    assert asked(chat_line(logprobs=True)).sampling == {"logprobs": 0}
    completion = asked(completion_line(prompt=[1, 2], logprobs=3))
    assert (completion.prompt, completion.sampling) == ([1, 2], {"logprobs": 3})
    assert not completion.defaults


def test_id_is_unique_and_known_by_its_line() -> None:
    finished = Finished("out")
    assert finished.claim("a", 1).origin == Origin("a", 1)
    assert finished.claim(None, 2).origin == Origin("line-2", 2)
    again = finished.claim("a", 3)
    assert (again.origin.id, again.first_line, again.is_finished) == ("a#line-3", 1, False)
    assert finished.claim(1, 4).origin.id == 1
    assert finished.claim("1", 5).first_line is None  # another id than the number


def test_results_of_another_input_are_refused() -> None:
    def finished() -> Finished:
        known = Finished("out")
        assert known.add("a", 0, is_error=False)
        assert known.add("c", 2, is_error=False)
        return known

    known = finished()
    assert known.claim("a", 1).is_finished
    assert not known.claim("b", 2).is_finished
    assert known.claim("c", 3).is_finished
    with pytest.raises(ConfigError, match="line 1 has the id 'x', and out has it for another"):
        finished().claim("x", 1)  # line 1 was another
    with pytest.raises(ConfigError, match="does not belong to this input"):
        finished().claim("c", 1)  # the id is that of line 3
    assert not finished().add("a", 5, is_error=False)
    assert not finished().add("z", 2, is_error=False)


def line_of(line_id: str, line: int) -> bytes:
    return refused(Origin(line_id, line), RequestError("no")).content + b"\n"


def opened(path: Path) -> ResultFile:
    results = open_results(str(path))
    try:
        results.read_finished()
    except ConfigError:
        results.close()
        raise
    return results


TWO = line_of("a", 1) + line_of("b", 2)


@pytest.mark.parametrize(
    "torn",
    [b"", b"{", b'{"id": "c", "ind', line_of("c", 3)[:-1], line_of("c", 3)[:20] + b"\n", b"\0" * 9],
)
def test_torn_last_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(TWO + torn)
    results = opened(path)
    assert (results.num_complete, results.num_cut_bytes) == (2, len(torn))
    results.append(Result(line_of("d", 4)[:-1], Usage(), is_error=True), lambda: False)
    results.close()
    assert path.read_bytes() == TWO + line_of("d", 4)


@pytest.mark.parametrize(
    "torn",
    [
        b'{"id"',
        b'{"id": "c',
        b'{"id": "c\\',
        b'{"id": -',
        b'{"id": 12, "ind',
        b'{"id": "c", "index": 2, "outp\0\0\n',
        b"\0" * 9,
        b"\n",
    ],
)
def test_torn_line_of_our_form_is_cut_off_when_it_is_the_first(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(torn)
    results = opened(path)
    assert (results.num_complete, results.num_cut_bytes) == (0, len(torn))
    results.close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id": 1, "prompt": "hello",}\n', "line 1 of .* is not a result"),
        (b'{"id": "a", "prompt": "hel', "line 1 of .* is not a result"),
        (b'{"id": "hello\n', "line 1 of .* is not a result"),
        (b'{"id": 12\n', "line 1 of .* is not a result"),
        (b"{\n", "line 1 of .* is not a result"),
        (b'{"id": [1', "line 1 of .* is not a result"),
        (b"my notes", "line 1 of .* is not a result of this command, and it is not overwritten"),
        (b'{"id": "a", "prompt": "b"}', "line 1 of .* is not a result"),
        (TWO + b'{"id": "c"}\n', "line 3 of .* is not a result"),
        (TWO + b'{"id": "c\n' + line_of("d", 4), "line 3 of .* is not a result"),
        (TWO + line_of("a", 3), "line 3 of .* has an id or an index that an earlier line has"),
        (TWO + line_of("c", 2), "line 3 of .* has an id or an index that an earlier line has"),
    ],
)
def test_file_of_something_else_is_refused_and_stays(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        opened(path)
    assert path.read_bytes() == content


def test_half_a_surrogate_pair_in_an_id_comes_back(tmp_path: Path) -> None:
    read = read_line(Line(1, b'{"id": "\\ud800", "prompt": "a"}'))
    assert read.id == "\ud800"
    content = refused(Origin(read.id, 1), RequestError("no")).content
    assert json.loads(content)["id"] == "\ud800"
    assert Finished("out").claim(read.id, 1).origin.id == "\ud800"


def test_output_in_use_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "out.jsonl")
    first = open_results(path)
    with pytest.raises(ConfigError, match=r"another run is writing .*out\.jsonl; wait for its end"):
        open_results(path)
    first.close()
    open_results(path).close()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{}", "cannot write .*: Is a directory; give another --output"),
        ("{}/none/out", "cannot write .*: the folder .*/none does not exist; make it, or give"),
    ],
)
def test_output_that_cannot_be_opened(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_results(path.format(tmp_path))
