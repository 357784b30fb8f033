"""What one request does to itself over HTTP is that request's alone: faults of ours that it shows,
a queue that is full, a template that it makes loop.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from quire.engine.answer_reader import AnswerReader
from quire.engine.core_io import StepOutput
from quire.engine.request import FinishReason
from quire.engine.startup import Engine
from quire.serving.shim.openai.answers import Splicer
from quire.serving.shim.openai.calls import Call

from ..gateway.gateways import ScriptedCore, real_core, until
from .shims import Front, front_stage

Run = Callable[..., Any]
# The request that shows the fault, by what each process knows of it.
BAD_ID, BAD_PROMPT = "bad", "The bad one"
NUM_TOKENS, NUM_BEFORE = 30, 5
SERVER_FAULT = "the server failed at this call; its log says why"
REQUEST_FAULT = "the server failed at this request, and at no other; its log says why"
ROW_FAULT = "its log says why"


class Asked:
    """Three calls at once, the second of them the bad one."""

    def __init__(self, front: Front, *, is_streamed: bool) -> None:
        self._front = front
        self._is_streamed = is_streamed

    async def answers(self) -> list[httpx.Response]:
        prompts = {"good": "Once upon a time", BAD_ID: BAD_PROMPT, "other": "Two"}
        return await asyncio.gather(*(self._ask(name, text) for name, text in prompts.items()))

    async def _ask(self, name: str, prompt: str) -> httpx.Response:
        fields = {"seed": 5, "temperature": 1.2, "max_tokens": NUM_TOKENS, "ignore_eos": True}
        body = {"prompt": prompt, "request_id": name, "stream": self._is_streamed} | fields
        headers = {"x-request-id": name}
        return await self._front.http.post("/v1/completions", json=body, headers=headers)


def texts_of(answer: httpx.Response) -> str:
    """Of an answer that is whole."""
    assert answer.status_code == 200, answer.text
    if "event-stream" not in answer.headers["content-type"]:
        text: str = answer.json()["choices"][0]["text"]
        return text
    *parts, done = [part.removeprefix("data: ") for part in answer.text.split("\n\n") if part]
    assert done == "[DONE]"
    return "".join(choice["text"] for part in parts for choice in json.loads(part)["choices"])


def require_failed(answer: httpx.Response, message: str, *, after_some: bool) -> None:
    """A status of its own, or the last event of a stream; nothing of ours is said."""
    if "event-stream" in answer.headers["content-type"]:
        assert answer.status_code == 200
        *parts, last, done = [part for part in answer.text.split("\n\n") if part]
        assert done == "data: [DONE]"
        assert bool(parts) is after_some
        body = json.loads(last.removeprefix("data: "))
    else:
        assert answer.status_code == 500
        body = answer.json()
    error = body["error"]
    assert error["message"].endswith(message)
    assert (error["type"], error["param"], error["code"]) == ("server_error", None, None)
    assert "ZeroDivisionError" not in answer.text


def with_fault(
    front: Run,
    monkeypatch: pytest.MonkeyPatch,
    break_it: Callable[[Front], None],
    message: str,
    *,
    is_streamed: bool,
) -> None:
    """The others are answered as before, and so is the bad one once it is mended."""

    async def use(front: Front) -> None:
        asked = Asked(front, is_streamed=is_streamed)
        undisturbed = [texts_of(answer) for answer in await asked.answers()]
        break_it(front)
        first, bad, other = await asked.answers()
        assert [texts_of(first), texts_of(other)] == [undisturbed[0], undisturbed[2]]
        require_failed(bad, message, after_some=is_streamed)
        monkeypatch.undo()
        assert [texts_of(answer) for answer in await asked.answers()] == undisturbed
        assert (await front.http.get("/health")).status_code == 200

    front(use)


async def tokens_of_bad(front: Front) -> tuple[int, ...]:
    answer = await front.http.post("/tokenize", json={"prompt": BAD_PROMPT})
    return tuple(answer.json()["tokens"])


@pytest.mark.parametrize("is_streamed", [True, False])
def test_fault_of_a_row_in_the_core_ends_that_call_alone(
    front: Run, demo: Engine, monkeypatch: pytest.MonkeyPatch, is_streamed: bool
) -> None:
    real = demo.core._on_token
    bad_ids: tuple[int, ...] = front(tokens_of_bad)

    def fail_for_one(of: Any, *given: Any) -> Any:
        request = of.request
        if tuple(request.prompt_token_ids) == bad_ids and request.num_output == NUM_BEFORE:
            raise ZeroDivisionError("a fault of ours")
        return real(of, *given)

    def break_it(_: Front) -> None:
        monkeypatch.setattr(demo.core, "_on_token", fail_for_one)

    with_fault(front, monkeypatch, break_it, ROW_FAULT, is_streamed=is_streamed)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_fault_of_an_answer_in_the_gateway_ends_that_call_alone(
    front: Run, monkeypatch: pytest.MonkeyPatch, is_streamed: bool
) -> None:
    real, seen = AnswerReader.read, {"bad": 0}

    def break_it(front: Front) -> None:
        def fail_for_one(self: AnswerReader, output: StepOutput) -> Any:
            for request in front.served.gateway.link.open_requests():
                is_bad = request.terms.request_id == BAD_ID
                if is_bad and request.choices[0].core_id == output.request_id:
                    seen["bad"] += 1
                    if seen["bad"] > NUM_BEFORE:
                        raise ZeroDivisionError("a fault of ours")
            return real(self, output)

        monkeypatch.setattr(AnswerReader, "read", fail_for_one)

    with_fault(front, monkeypatch, break_it, REQUEST_FAULT, is_streamed=is_streamed)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_fault_of_an_answer_in_the_shim_ends_that_call_alone(
    front: Run, monkeypatch: pytest.MonkeyPatch, is_streamed: bool
) -> None:
    """In the middle of a stream it closed the connection, and no client knew why."""
    real_chunk, real_whole, seen = Splicer.chunk, Call._whole_choice, {"bad": 0}

    def break_it(_: Front) -> None:
        def fail_for_chunk(self: Splicer, text: str) -> bytes:
            seen["bad"] += b'cmpl-bad"' in self._before
            if b'cmpl-bad"' in self._before and seen["bad"] > NUM_BEFORE:
                raise ZeroDivisionError("a fault of ours")
            return real_chunk(self, text)

        def fail_for_whole(self: Call, choice: Any) -> Any:
            if self._head.id == BAD_ID:
                raise ZeroDivisionError("a fault of ours")
            return real_whole(self, choice)

        monkeypatch.setattr(Splicer, "chunk", fail_for_chunk)
        monkeypatch.setattr(Call, "_whole_choice", fail_for_whole)

    with_fault(front, monkeypatch, break_it, SERVER_FAULT, is_streamed=is_streamed)


# What is more than the engine takes


def test_full_queue_is_429_and_those_that_wait_are_answered() -> None:
    core = ScriptedCore()

    async def ask(front: Front, **fields: Any) -> httpx.Response:
        body = {"prompt": [50, 51], "model": None} | fields
        return await front.http.post("/v1/completions", json=body)

    async def use(front: Front) -> None:
        running = asyncio.create_task(ask(front, stream=True))
        (core_id,) = await core.submitted()
        await core.send(StepOutput(core_id, (40,)))
        await until(lambda: front.served.gateway.metrics.num_queued == 0)
        waiting = []
        for number in range(2):
            waiting.append(asyncio.create_task(ask(front, stream=number == 0)))
            await core.submitted(number + 2)
        for stream in (False, True):
            for prompt in ([50], [[50], [51]]):
                refused = await ask(front, prompt=prompt, stream=stream)
                assert refused.status_code == 429
                error = refused.json()["error"]
                assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
                assert "max_num_queued_reqs" in error["message"]
                assert 1 <= int(refused.headers["retry-after"]) <= 60
                assert 100 <= int(refused.headers["retry-after-ms"]) <= 60_000
        assert front.engine.num_open == 3
        for one in await core.submitted(3):
            await core.send(StepOutput(one, (41,), finish_reason=FinishReason.LENGTH))
        for call in (running, *waiting):
            assert texts_of(await call)

    with front_stage(core.opened, max_num_queued_reqs=2) as run:
        run(use)


LOOPS = (
    "{% for i in range(n | default(1)) %}{% for j in range(n | default(1)) %}{% endfor %}"
    "{% endfor %}{% for message in messages %}{{ message.content }}{% endfor %}"
)


def test_template_that_its_variables_make_loop_is_refused_and_streams_go_on(demo: Engine) -> None:
    """More of them than there are threads for prompts."""

    async def use(front: Front) -> None:
        body = {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "seed": 1}
        undisturbed = texts_of(await front.http.post("/v1/completions", json=body))
        streamed = {"stream": True} | body
        stream = asyncio.create_task(front.http.post("/v1/completions", json=streamed))
        loops = {"chat_template_kwargs": {"n": 99_999}, "max_tokens": 4}
        found = await asyncio.gather(*(front.chat(**loops) for _ in range(4)))
        for answer in found:
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert "ran longer than 1 s" in error["message"]
            assert error["param"] == "messages"
        assert texts_of(await stream) == undisturbed
        assert (await front.chat(max_tokens=4, chat_template_kwargs={"n": 3})).status_code == 200

    with front_stage(real_core(demo), engine={"model": None, "chat_template": LOOPS}) as run:
        run(use)


def test_all_logprobs_are_all_of_them(front: Run, demo: Engine) -> None:
    """In a conversation the last was left out, and they were counted as if there were none."""

    async def use(front: Front) -> None:
        asked = {"logprobs": True, "top_logprobs": -1, "max_tokens": 3, "ignore_eos": True}
        (choice,) = (await front.chat(**asked)).json()["choices"]
        counts = {len(one["top_logprobs"]) for one in choice["logprobs"]["content"]}
        assert counts == {demo.logits_width}

    front(use)
