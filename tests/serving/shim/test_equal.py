"""An answer is the same whole and streamed, and however the bytes of its request come."""

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from openai._streaming import SSEDecoder
from quire.serving.shim.protocol import BoundedProtocol

from .shims import MODEL, SUM, Front
from .test_http import CHAT, events_of

Run = Callable[..., Any]
Json = dict[str, Any]
COMPLETIONS = "/v1/completions"
# Characters of one to four bytes; the model's tokens are parts of some of them.
TEXTS = st.sampled_from(
    ["One, two, three,", "안녕하세요 🦊", "naïve — ", "\u2028\r\n\x00", "{}"]
) | st.text(min_size=1, max_size=12)
BYTES = [*range(100, 260, 8)]
IDS = st.lists(st.integers(3, 1000), min_size=1, max_size=5)


@st.composite
def samplings(draw: st.DrawFn) -> Json:
    n = draw(st.integers(1, 3))
    body: Json = {
        "model": MODEL,
        "n": n,
        "seed": draw(st.integers(0, 2**63 - 1)),
        "temperature": draw(st.sampled_from([0.7, 1, 1.5] if n > 1 else [0, 0, 1, 2])),
        "max_tokens": draw(st.integers(1, 10)),
    }
    optional: Json = {
        "stop": st.sampled_from([",", ["8", "t"], [" = ", "the"], "🦊"]),
        "include_stop_str_in_output": st.booleans(),
        "ignore_eos": st.booleans(),
        "return_token_ids": st.booleans(),
        "return_tokens_as_token_ids": st.booleans(),
        # Of every byte of a character, in any order: most of it is no text.
        "allowed_token_ids": st.sampled_from([BYTES, [*range(300, 1200, 50)]]),
    }
    return body | draw(st.fixed_dictionaries({}, optional=optional))


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, Json]:
    """A route and a body for it, which the route takes."""
    body = draw(samplings())
    if draw(st.booleans()):
        turns = draw(st.just(SUM) | TEXTS.map(lambda text: [{"role": "user", "content": text}]))
        if draw(st.booleans()):
            begun = [*turns, {"role": "assistant", "content": "23 +"}]
            body |= {"messages": begun, "continue_final_message": True, "echo": draw(st.booleans())}
        else:
            body["messages"] = turns
        if draw(st.booleans()):
            body |= {"logprobs": True, "top_logprobs": draw(st.integers(0, 3))}
        return CHAT, body
    body["prompt"] = draw(TEXTS | IDS | st.lists(TEXTS, min_size=1, max_size=3))
    body["logprobs"] = draw(st.none() | st.integers(0, 3))
    body["echo"] = draw(st.booleans())
    if body["echo"] and draw(st.booleans()):
        body["max_tokens"] = 0
    return COMPLETIONS, body


STREAM_OPTIONS = st.none() | st.fixed_dictionaries(
    {"include_usage": st.booleans(), "continuous_usage_stats": st.booleans()}
)


def put_together(events: list[Json], path: str, options: Json | None) -> Json:
    """The whole answer that a stream makes; what holds for every stream holds for this one."""
    options = options or {}
    wants_usage = bool(options.get("include_usage"))
    head = {name: events[0][name] for name in ("id", "created", "model", "system_fingerprint")}
    made = head | {"choices": {}}
    if wants_usage:
        *events, last = events
        assert last["choices"] == []
        made["usage"] = last["usage"]
    for event in events:
        assert head.items() <= event.items()
        assert event["object"] == ("chat.completion.chunk" if path == CHAT else "text_completion")
        (one,) = event["choices"]
        if (choice := made["choices"].get(one["index"])) is None:
            choice = made["choices"][one["index"]] = {"text": "", "finish_reason": None}
            assert path != CHAT or one["delta"].pop("role") == "assistant"
        add(choice, one, path)
    if wants_usage and options.get("continuous_usage_stats"):
        so_far = [event["usage"]["completion_tokens"] for event in events]
        assert so_far == sorted(so_far)
        assert so_far[-1] == made["usage"]["completion_tokens"]
        total = made["usage"]["prompt_tokens"]
        assert all(e["usage"]["prompt_tokens"] <= total for e in events)
        assert events[-1]["usage"]["prompt_tokens"] == total
    else:
        assert all(event.get("usage", 0) == (None if wants_usage else 0) for event in events)
    made["choices"] = [made["choices"][index] for index in sorted(made["choices"])]
    return made


def add(choice: Json, one: Json, path: str) -> None:
    """One chunk to what its choice has so far."""
    assert choice["finish_reason"] is None, "a chunk after the last one"
    if path == CHAT:
        assert set(one["delta"]) <= {"content"}
        choice["text"] += one["delta"].get("content", "")
    else:
        choice["text"] += one["text"]
    choice["finish_reason"] = one["finish_reason"]
    if one["finish_reason"] is not None:
        choice["stop_reason"] = one["stop_reason"]
    choice.setdefault("token_ids", []).extend(one.get("token_ids", []))
    for name, values in (one["logprobs"] or {}).items():
        choice.setdefault("logprobs", {}).setdefault(name, []).extend(values or [])


def as_streamed(whole: Json, path: str) -> list[Json]:
    """The choices of a whole answer, in the shape of put_together()."""
    made = []
    for index, choice in enumerate(whole["choices"]):
        assert choice["index"] == index
        text = choice["message"]["content"] if path == CHAT else choice["text"]
        ending = {name: choice[name] for name in ("finish_reason", "stop_reason")}
        one = {"text": text, "token_ids": choice.get("token_ids", []), **ending}
        if choice["logprobs"] is not None and any(choice["logprobs"].values()):
            one["logprobs"] = {name: values or [] for name, values in choice["logprobs"].items()}
        made.append(one)
    return made


def counts(usage: Json) -> Json:
    """Without the cached tokens, of which the second call has more."""
    return {name: n for name, n in usage.items() if name != "prompt_tokens_details"}


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(bodies(), STREAM_OPTIONS)
@example(
    (COMPLETIONS, {"prompt": "a", "echo": True, "max_tokens": 0, "return_token_ids": True}),
    {"include_usage": True, "continuous_usage_stats": True},
)
@example((CHAT, {"messages": SUM, "temperature": 0}), None)
@example(
    (COMPLETIONS, {"prompt": "a", "allowed_token_ids": BYTES, "logprobs": 0, "temperature": 0}),
    None,
)
def test_stream_put_together_is_the_whole_answer(
    front: Run, asked: tuple[str, Json], options: Json | None
) -> None:
    path, body = asked

    async def use(front: Front) -> None:
        streaming = body | {"stream": True} | ({"stream_options": options} if options else {})
        answers = [await front.http.post(path, json=one) for one in (body, streaming)]
        assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
        whole = answers[0].json()
        streamed = put_together(events_of(answers[1].text), path, options)
        assert streamed["choices"] == as_streamed(whole, path)
        assert streamed["model"] == whole["model"]
        if body.get("return_token_ids"):
            num_tokens = sum(len(choice["token_ids"]) for choice in streamed["choices"])
            assert num_tokens == whole["usage"]["completion_tokens"]
        if "usage" in streamed:
            assert counts(streamed["usage"]) == counts(whole["usage"])

    front(use)


# The bytes of a request and of its answer, in any pieces

QUESTION: Json = {"messages": SUM, "temperature": 0, "logprobs": True}
FOX: Json = {
    "prompt": "🦊\u2028\n" + "é" * 5,
    "n": 2,
    "seed": 8,
    "temperature": 1,
    "max_tokens": 12,
    "allowed_token_ids": [175, 256, 102, 235, 502, 233, *range(300, 1200, 50)],
    "stream_options": {"include_usage": True},
    "stream": True,
}


@pytest.fixture
def num_received(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many bytes each of the server's reads had."""
    sizes: list[int] = []
    receive = BoundedProtocol.data_received

    def noted(self: BoundedProtocol, data: bytes) -> None:
        sizes.append(len(data))
        receive(self, data)

    monkeypatch.setattr(BoundedProtocol, "data_received", noted)
    return sizes


def cut(whole: bytes, places: Iterable[int]) -> list[bytes]:
    """The pieces between places, none of them empty."""
    places = sorted({0, len(whole)} | {place % len(whole) for place in places})
    return [whole[start:end] for start, end in pairwise(places)]


def request_of(path: str, body: Json) -> bytes:
    content = json.dumps(body, ensure_ascii=False).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        f"content-length: {len(content)}",
        "x-request-id: mine",
        "connection: close",
        "\r\n",
    ]
    return "\r\n".join(lines).encode() + content


async def answer_to(front: Front, pieces: Sequence[bytes], num_received: list[int]) -> bytes:
    """What comes back for pieces that the server reads one by one."""
    port = int(front.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        num_sent = sum(num_received)
        for piece in pieces:
            writer.write(piece)
            num_sent += len(piece)
            while sum(num_received) < num_sent and not reader.at_eof():
                await asyncio.sleep(0)
        return await reader.read()
    finally:
        writer.close()


def parts_of(answer: bytes) -> list[bytes]:
    """The body of a 200, in the parts that HTTP's chunks are; one if there are none."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    if b"transfer-encoding: chunked" not in head:
        return [rest]
    parts = []
    while True:
        size, _, rest = rest.partition(b"\r\n")
        num_bytes = int(size, 16)
        assert rest[num_bytes : num_bytes + 2] == b"\r\n"
        if not num_bytes:
            return parts
        parts.append(rest[:num_bytes])
        rest = rest[num_bytes + 2 :]


def meaning(path: str, body: Json, answer: bytes) -> Json:
    """An answer without what two equal ones may differ in."""
    content = b"".join(parts_of(answer)).decode()
    if body.get("stream"):
        made = put_together(events_of(content), path, body.get("stream_options"))
    else:
        made = json.loads(content)
    assert made["id"].endswith("-mine")
    return made | {"created": 0, "usage": counts(made["usage"])}


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([(CHAT, QUESTION), (COMPLETIONS, FOX)]),
    st.lists(st.integers(0, 10_000), max_size=40),
)
def test_pieces_of_a_request_change_nothing(
    front: Run, num_received: list[int], asked: tuple[str, Json], places: list[int]
) -> None:
    path, body = asked
    request = request_of(path, body)
    ways = ([request], cut(request, places), cut(request, range(len(request))))

    async def use(front: Front) -> None:
        answers = [await answer_to(front, pieces, num_received) for pieces in ways]
        assert num_received == [len(piece) for pieces in ways for piece in pieces]
        plain, *others = [meaning(path, body, answer) for answer in answers]
        assert others == [plain, plain]

    num_received.clear()
    front(use)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 100_000), max_size=60))
def test_events_are_whole_and_can_be_read_in_any_pieces(
    front: Run, num_received: list[int], seed: int, places: list[int]
) -> None:
    """Each part that is sent is some whole events, which also OpenAI's own reader finds."""

    async def use(front: Front) -> bytes:
        request = request_of(COMPLETIONS, FOX | {"seed": seed})
        return await answer_to(front, [request], num_received)

    parts = parts_of(front(use))
    for part in parts:
        assert part.endswith(b"\n\n")
        for line in part.decode().removesuffix("\n\n").split("\n\n"):
            assert line.startswith("data: ")
            assert "\n" not in line
            assert "\r" not in line
    body = b"".join(parts)
    events = events_of(body.decode())
    read = [sse.data for sse in SSEDecoder().iter_bytes(iter(cut(body, places)))]
    assert read.pop() == "[DONE]"
    assert [json.loads(one) for one in read] == events


def test_answer_over_http_means_something(front: Run) -> None:
    async def use(front: Front) -> None:
        answer = (await front.chat()).json()["choices"][0]
        assert answer["message"]["content"] == "23 + 58 = 81."
        assert answer["finish_reason"] == "stop"
        streamed = put_together(events_of((await front.chat(stream=True)).text), CHAT, None)
        assert streamed["choices"][0]["text"] == "23 + 58 = 81."

    front(use)
