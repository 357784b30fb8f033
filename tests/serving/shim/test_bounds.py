"""One caller of the shim cannot hurt another, and is told in HTTP's words what was wrong."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from quire.protos.quire.v1 import inference_pb2 as pb
from quire.serving.cli import main
from quire.serving.http_config import LinkConfig
from quire.serving.shim.openai.errors import HttpError

from .shims import KEY, SUM, Front

Run = Callable[..., Any]


def test_request_over_the_engines_message_limit_ends_alone(front: Run) -> None:
    """It ended the stream, and with it the requests of everybody."""

    async def use(front: Front) -> None:
        other = asyncio.create_task(front.complete(max_tokens=300, ignore_eos=True))
        large = await front.complete(prompt="a" * ((32 << 20) - 100))
        assert large.status_code == 400
        assert "bytes" in large.json()["error"]["message"]
        assert (await other).status_code == 200

    front(use)


def test_answer_that_this_shim_does_not_take_is_a_503_like_the_engines(
    front: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a 408, which says that the request did not come in time."""
    monkeypatch.setattr("quire.serving.shim.engine.MAX_WAITING_BYTES", 0)  # one event

    async def use(front: Front) -> None:
        answer = await front.complete(n=4, temperature=1, max_tokens=50, ignore_eos=True)
        assert answer.status_code == 503, answer.text
        assert answer.headers["retry-after"] == "1"
        of_engine = pb.SessionError(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        assert answer.json() == HttpError.of_session(of_engine).body
        assert "faster than it was taken; read faster" in answer.text

    front(use)


def test_many_prompts_share_a_request_id(front: Run) -> None:
    async def use(front: Front) -> None:
        answer = await front.complete(prompt=["a", "b"], request_id="x", max_tokens=1)
        assert answer.status_code == 200

    front(use)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "\ud800"},
        {"cache_salt": "\ud800"},
        {"request_id": "\ud800"},
        {"prompt": "\ud800"},
        {"prompt": [None] * 300_000},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [1, "a"]},
        {"prompt": [-1]},
        {"prompt": [2**40]},
        {"prompt": ["a"] * 1025},
        {"prompt": "\ud800", "echo": True},
        {"model": "\ud800", "echo": True},
        {"prompt": [-1], "echo": True},
        {"prompt": [2**40], "echo": True},
        {"\ud800": 1},
        {"stop_token_ids": [None] * 300_000},
        {"logit_bias": {str(i): 1.0 for i in range(2000)}},
        {"n": 2**40},
        {"best_of": 3},
        {"truncate_prompt_tokens": 0},
        {"truncate_prompt_tokens": 2**40},
        {"truncation_side": "right"},
        {"stream": True, "prompt_logprobs": 1},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_bad_field_is_a_400(front: Run, fields: dict[str, Any]) -> None:
    async def use(front: Front) -> None:
        body = json.dumps({"prompt": "a", "max_tokens": 1} | fields).encode()
        answer = await front.http.post(
            "/v1/completions", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400, answer.text
        assert len(answer.text) < 1000

    front(use)


def test_what_asks_for_nothing_is_taken(front: Run) -> None:
    async def use(front: Front) -> None:
        nothing = {"best_of": 1, "stream_options": None, "tools": [], "suffix": None, "user": "me"}
        assert (await front.complete(max_tokens=1, **nothing)).status_code == 200

    front(use)


def test_head_is_answered_where_get_is(front: Run) -> None:
    async def use(front: Front) -> None:
        assert (await front.http.head("/health")).status_code == 200
        refused = await front.http.get("/v1/completions")
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")

    front(use)


@pytest.mark.parametrize(
    "key", [None, "Bearer wrong", "Bearer s\xe9cret", "Basic abc", "Bearer", "sk-1"]
)
def test_wrong_key_is_refused_before_the_body_is_read(keyed: Run, key: str | None) -> None:
    async def use(front: Front) -> None:
        headers = {} if key is None else {"authorization": key.encode("latin-1")}
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            answer = await front.http.post(path, content=b"not json", headers=headers)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/v1/models", "/version", "/metrics"):
            assert (await front.http.get(path, headers=headers)).status_code == 401, path
        for path in ("/health", "/ready", "/ping", "/", "/openapi.json"):
            assert (await front.http.get(path, headers=headers)).status_code == 200, path

    keyed(use)


def test_callers_key_is_taken_and_its_prompts_are_its_own(keyed: Run) -> None:
    async def use(front: Front) -> None:
        headers = {"authorization": f"Bearer {KEY}"}
        body = {"messages": SUM, "temperature": 0}
        for _ in range(2):
            answer = await front.http.post("/v1/chat/completions", json=body, headers=headers)
            assert "81" in answer.json()["choices"][0]["message"]["content"]
        assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0

    keyed(use)


async def raw(front: Front, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(front.url.rpartition(":")[2]))
    writer.write(data)
    try:
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def test_pipelined_request_ends_the_connection_and_the_first(front: Run) -> None:
    """The first ran on for nobody."""

    async def use(front: Front) -> None:
        body = b'{"prompt": "a", "max_tokens": 900, "ignore_eos": true}'
        head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        one = head + b"content-length: %d\r\n\r\n" % len(body) + body
        assert await raw(front, one + one) == b""

    front(use)


def test_trailers_end_the_connection(front: Run) -> None:
    async def use(front: Front) -> None:
        head = b"POST /tokenize HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
        assert await raw(front, head + b"2\r\n{}\r\n0\r\n" + b"x: y\r\n" * 10) == b""

    front(use)


def test_key_of_a_shim_is_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was read as a list of keys, so no shim with a key ever started."""
    seen: list[LinkConfig] = []

    def note(link: LinkConfig) -> None:
        seen.append(link)
        raise KeyboardInterrupt

    monkeypatch.setattr("quire.serving.shim_command.check_bind", lambda *_: note(made[-1]))
    made: list[LinkConfig] = []
    real = LinkConfig.__post_init__

    def keep(self: LinkConfig) -> None:
        real(self)
        made.append(self)

    monkeypatch.setattr(LinkConfig, "__post_init__", keep)
    assert main(["shim", "--engine-api-key", "a,b"]) == 130
    assert seen[0].engine_api_key == "a,b"
