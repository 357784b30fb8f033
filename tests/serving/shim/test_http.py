"""What the shim does with HTTP that no SDK sends, and with clients that go."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from quire.serving.shim import protocol

from ..gateway.gateways import until
from .shims import MODEL, SUM, Front

Run = Callable[..., Any]
CHAT = "/v1/chat/completions"


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a whole stream, which ends as it must."""
    *parts, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """OpenAI's error object; whatever went wrong, it has one shape."""
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    ("content", "headers", "status", "part"),
    [
        (b"{", {}, 400, "not JSON"),
        (b"[]", {}, 400, "must be a JSON object"),
        (b'{"a": 1, "a": 2}', {}, 400, "twice"),
        (b"[" * 10_000, {}, 400, "nested"),
        (b'{"a":' * 10_000, {}, 400, "nested"),
        (b'{"temperature": NaN}', {}, 400, "NaN"),
        (b'{"temperature": 1e999}', {}, 400, "too large"),
        (b"\xff", {}, 400, "UTF-8"),
        (b"{}", {"content-type": "text/plain"}, 415, "application/json"),
        (b"\x1f\x8b" + b"0" * 100, {"content-encoding": "gzip"}, 415, "compressed"),
        (b"{}", {}, 400, "messages"),
        (b"{}", {"x-request-id": "a b"}, 400, "without spaces, got 'a b'; leave it out"),
        (b"{}", {"authorization": "Basic abc"}, 401, "Bearer KEY"),
        (b" " * ((32 << 20) + 1), {}, 413, "32 MiB"),
    ],
)
def test_bad_body_is_an_error_object(
    front: Run, content: bytes, headers: dict[str, str], status: int, part: str
) -> None:
    async def use(front: Front) -> None:
        kind = {"content-type": "application/json"}
        answer = await front.http.post(CHAT, content=content, headers=kind | headers)
        assert answer.status_code == status
        assert part in error_of(answer)["message"]
        assert "81" in (await front.chat()).text

    front(use)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("OPTIONS", CHAT, 405),
        ("DELETE", "/health", 405),
    ],
)
def test_wrong_route_is_an_error_object(front: Run, method: str, path: str, status: int) -> None:
    async def use(front: Front) -> None:
        answer = await front.http.request(method, path)
        assert answer.status_code == status
        error_of(answer)

    front(use)


def test_request_id_comes_back(front: Run) -> None:
    async def use(front: Front) -> None:
        answer = await front.http.post(
            CHAT, json={"messages": SUM, "max_tokens": 1}, headers={"x-request-id": "mine-1"}
        )
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.json()["id"] == "chatcmpl-mine-1"
        assert answer.json()["model"] == MODEL

    front(use)


def test_health_and_helpers_answer(front: Run) -> None:
    async def use(front: Front) -> None:
        for path in ("/health", "/ready", "/ping"):
            answer = await front.http.get(path)
            assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
        assert (await front.http.get("/version")).json()["version"]
        assert "quire_" in (await front.http.get("/metrics")).text
        made = (await front.http.get("/openapi.json")).json()
        assert CHAT in made["paths"]
        tokens = (await front.http.post("/tokenize", json={"prompt": "Hello there"})).json()
        assert tokens["count"] == len(tokens["tokens"])
        text = await front.http.post("/detokenize", json={"tokens": tokens["tokens"]})
        assert text.json()["prompt"] == text.json()["content"] == "Hello there"
        chat = (await front.http.post("/tokenize", json={"messages": SUM})).json()
        assert chat["count"] > 5
        bad = await front.http.post("/tokenize", json={"prompt": "a", "promt": 1})
        assert error_of(bad)["param"] == "promt"

    front(use)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/tokenize", {}, "send either prompt or messages, got neither"),
        ("/tokenize", {"prompt": "", "messages": []}, "send either prompt or messages, got both"),
        ("/tokenize", {"prompt": 5}, "prompt must be a string, got 5"),
        ("/tokenize", {"messages": {"a": 1}}, "messages must be a list of objects, got {'a': 1}"),
        ("/tokenize", {"messages": [{}, 7]}, "messages must be a list of objects, got 7"),
        (
            "/detokenize",
            {},
            "tokens must be a list of token ids, as /tokenize gives them, got None",
        ),
        ("/detokenize", {"tokens": [1, None]}, "as /tokenize gives them, got None"),
        ("/detokenize", {"tokens": [1, -1]}, "as /tokenize gives them, got -1"),
        ("/detokenize", {"tokens": [True]}, "as /tokenize gives them, got True"),
    ],
)
def test_helpers_tell_the_rule_and_the_value(
    front: Run, path: str, body: dict[str, Any], message: str
) -> None:
    async def use(front: Front) -> None:
        answer = await front.http.post(path, json=body)
        assert answer.status_code == 400
        assert message in error_of(answer)["message"]

    front(use)


def test_echo_has_the_prompt_and_its_logprobs(front: Run) -> None:
    async def use(front: Front) -> None:
        asked = {"echo": True, "logprobs": 2, "max_tokens": 3}
        whole = (await front.complete(**asked)).json()["choices"][0]
        assert whole["text"].startswith("Once upon a time")
        logprobs = whole["logprobs"]
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        assert len({len(values) for values in logprobs.values()}) == 1
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            assert whole["text"][offset:].startswith(token)
        only = (await front.complete(echo=True, max_tokens=0)).json()
        assert only["choices"][0]["text"] == "Once upon a time"
        assert only["usage"]["completion_tokens"] == 0

    front(use)


def test_echo_is_of_what_the_model_saw(front: Run) -> None:
    async def use(front: Front) -> None:
        tokens = (await front.http.post("/tokenize", json={"prompt": "one two three"})).json()
        for prompt in ("one two three", tokens["tokens"]):
            for most in (2, -1, 100):
                asked = {"echo": True, "logprobs": 1, "max_tokens": 3}
                cut = await front.complete(prompt=prompt, truncate_prompt_tokens=most, **asked)
                kept = tokens["tokens"][-most:] if most > 0 else tokens["tokens"]
                whole = await front.complete(prompt=kept, **asked)
                assert (
                    cut.json()["choices"][0]["logprobs"] == whole.json()["choices"][0]["logprobs"]
                )

    front(use)


def test_echo_of_a_conversation_is_its_last_message(front: Run) -> None:
    async def use(front: Front) -> None:
        begun = [*SUM, {"role": "assistant", "content": "23 + 58"}]
        fields = {"messages": begun, "continue_final_message": True, "max_tokens": 20}
        plain = (await front.chat(**fields)).json()["choices"][0]["message"]["content"]
        whole = (await front.chat(echo=True, **fields)).json()["choices"][0]["message"]["content"]
        assert whole == "23 + 58" + plain == "23 + 58 = 81."
        chunks = events_of((await front.chat(echo=True, stream=True, **fields)).text)
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == whole
        answer = (await front.chat(echo=True)).json()["choices"][0]["message"]["content"]
        assert answer == "23 + 58 = 81."  # the last message is the user's

    front(use)


def test_token_that_is_a_part_of_a_character_tells_no_bytes(front: Run) -> None:
    async def use(front: Front) -> None:
        (part, *_) = (await front.http.post("/tokenize", json={"prompt": "🦊"})).json()["tokens"]
        (whole,) = (await front.http.post("/tokenize", json={"prompt": "a"})).json()["tokens"]
        for token, told in ((part, None), (whole, [97])):
            answer = await front.chat(allowed_token_ids=[token], logprobs=True, max_tokens=1)
            (one,) = answer.json()["choices"][0]["logprobs"]["content"]
            assert one["bytes"] == told

    front(use)


def test_prompt_that_is_too_long_has_openais_code(front: Run) -> None:
    async def use(front: Front) -> None:
        for answer in (
            await front.complete(prompt="word " * 3000),
            await front.complete(prompt=[5] * 1024),
            await front.complete(prompt=[5] * 5000, echo=True),
            await front.complete(prompt="word " * 3000, echo=True),
            await front.complete(prompt=[5] * 5000, truncate_prompt_tokens=4000),
            await front.chat(messages=[{"role": "user", "content": "word " * 3000}]),
        ):
            assert answer.status_code == 400
            assert error_of(answer)["code"] == "context_length_exceeded"
            # LangChain looks at no code, but for these words.
            assert error_of(answer)["message"].startswith("prompt is too long: ")

    front(use)


def test_body_of_too_many_values_is_refused_at_once(front: Run) -> None:
    async def use(front: Front) -> None:
        answer = await front.complete(prompt=[5] * (3 << 20))
        assert answer.status_code == 400
        assert "commas" in error_of(answer)["message"]

    front(use)


def test_every_chunk_tells_the_usage_so_far(front: Run) -> None:
    async def use(front: Front) -> None:
        asked = {"include_usage": True, "continuous_usage_stats": True}
        for call in (front.complete, front.chat):
            answer = await call(stream=True, stream_options=asked, max_tokens=4, ignore_eos=True)
            *chunks, last = events_of(answer.text)
            assert last["choices"] == []
            total = last["usage"]
            for chunk in chunks:
                usage = chunk["usage"]
                assert usage["prompt_tokens"] == total["prompt_tokens"]
                assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
            assert [c["usage"]["completion_tokens"] for c in chunks][-1] == 4
        only = await front.complete(stream=True, stream_options=asked, echo=True, max_tokens=0)
        assert {c["usage"]["completion_tokens"] for c in events_of(only.text)} == {0}

    front(use)


def test_streamed_completion_equals_the_whole_one(front: Run) -> None:
    async def use(front: Front) -> None:
        for more in ({}, {"n": 2, "temperature": 1, "seed": 5}, {"logprobs": 1}, {"echo": True}):
            asked = {"max_tokens": 12, "ignore_eos": True} | more
            whole = (await front.complete(**asked)).json()["choices"]
            answer = await front.complete(stream=True, **asked)
            lines = [line for line in answer.text.split("\n\n") if line]
            assert lines[-1] == "data: [DONE]"
            texts = ["" for _ in whole]
            tokens: list[str] = []
            for line in lines[:-1]:
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                texts[choice["index"]] += choice["text"]
                tokens += (choice["logprobs"] or {}).get("tokens", [])
            assert texts == [choice["text"] for choice in whole]
            if whole[0]["logprobs"] is not None:
                assert tokens == whole[0]["logprobs"]["tokens"]

    front(use)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_client_that_goes_ends_its_request(front: Run, is_streamed: bool) -> None:
    """until_idle(), after every test, sees that nothing is left of it."""

    async def use(front: Front) -> None:
        body = json.dumps(
            {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": is_streamed}
        ).encode()
        port = int(front.url.rpartition(":")[2])
        metrics = front.served.gateway.metrics
        before, tokens = metrics.finished_by_reason["abort"], metrics.num_generation_tokens
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(_head("/v1/completions", len(body)) + body)
        await until(lambda: metrics.num_generation_tokens > tokens)
        writer.transport.abort()
        await until(lambda: metrics.num_open == 0)
        assert metrics.finished_by_reason["abort"] == before + 1

    front(use)


async def _answer_to(front: Front, *parts: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(front.url.rpartition(":")[2]))
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def _head(path: str, num_bytes: int, *more: str) -> bytes:
    lines = (
        f"POST {path} HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        f"content-length: {num_bytes}",
        *more,
    )
    return "\r\n".join((*lines, "\r\n")).encode()


@pytest.mark.parametrize("size", [70_000, 1 << 20])
def test_large_head_is_refused(front: Run, size: int) -> None:
    async def use(front: Front) -> None:
        head = _head("/v1/completions", 2, f"x-large: {'a' * size}")
        answer = await _answer_to(front, head, b"{}")
        # What is still on its way to a closed connection takes the answer with it.
        assert answer.startswith(b"HTTP/1.1 431 ") or (size > 100_000 and answer == b"")

    front(use)


def test_slow_head_is_refused(front: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.2)

    async def use(front: Front) -> None:
        assert (await _answer_to(front, b"POST /v1/comp")).startswith(b"HTTP/1.1 408 ")
        assert (await _answer_to(front)).startswith(b"HTTP/1.1 408 ")

    front(use)
