"""Logprobs of long prompts take long to put into a message; nobody else waits for that."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from quire.engine.core_io import PositionLogprobs, StepOutput
from quire.engine.request import FinishReason
from quire.protos.quire.v1 import inference_pb2 as pb
from quire.serving.gateway import core_link

from .gateways import ScriptedCore, Served, hear, serve, until

POSITIONS = tuple(
    PositionLogprobs(5, -1.0, 1, np.array([5], np.int32), np.array([-1.0], np.float32))
    for _ in range(3)
)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, no message is made."""
    made, may = core_link.prompt_logprobs, threading.Event()

    def slowly(*given: Any) -> pb.PromptLogprobs:
        assert may.wait(60)
        return made(*given)

    monkeypatch.setattr(core_link, "prompt_logprobs", slowly)
    yield may
    may.set()


def asking(n: int = 1) -> pb.GenerateRequest:
    params = pb.SamplingParams(prompt_logprobs=0, n=n, temperature=1, max_tokens=9)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 4), sampling_params=params)


def plain() -> pb.GenerateRequest:
    params = pb.SamplingParams(max_tokens=9)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 4), sampling_params=params)


def last(core_id: str, *token_ids: int) -> StepOutput:
    return StepOutput(core_id, token_ids, finish_reason=FinishReason.LENGTH)


def first(core_id: str) -> StepOutput:
    return StepOutput(core_id, (40,), prompt_logprobs=POSITIONS)


def test_others_go_on_and_nothing_is_out_of_order(gate: threading.Event) -> None:
    core = ScriptedCore()

    async def use(g: Served) -> None:
        slow = asyncio.ensure_future(hear(g.stub.GenerateStream(asking(n=2))))
        one, two = await core.submitted(2)
        whole = asyncio.ensure_future(g.stub.Generate(asking()))
        *_, three = await core.submitted(3)
        await core.send(first(one), first(two), first(three))
        other = asyncio.ensure_future(hear(g.stub.GenerateStream(plain())))
        *_, four = await core.submitted(4)
        await core.send(StepOutput(two, (41,)), StepOutput(one, (42,)), StepOutput(four, (40,)))
        await core.send(last(one, 43), last(two, 44), last(three), last(four))
        assert (await other).messages[-1].finish_reason == pb.FINISH_REASON_LENGTH
        assert not slow.done()
        gate.set()
        messages = (await slow).messages
        told = [m for m in messages if m.HasField("prompt_logprobs")]
        assert told == messages[:1]
        assert len(told[0].prompt_logprobs.positions) == 4
        ids = {i: [t for m in messages if m.index == i for t in m.token_ids] for i in (0, 1)}
        assert ids == {0: [40, 42, 43], 1: [40, 41, 44]}
        assert [m.HasField("summary") for m in messages].index(True) == len(messages) - 1
        answer = await whole
        assert len(answer.prompt_logprobs.positions) == 4
        assert list(answer.outputs[0].token_ids) == [40]

    serve(core.opened, use)


def test_core_that_is_lost_meanwhile_makes_the_tokens_again(gate: threading.Event) -> None:
    core = ScriptedCore()

    async def use(g: Served) -> None:
        call = asyncio.ensure_future(g.stub.Generate(asking()))
        (one,) = await core.submitted()
        await core.send(first(one), StepOutput(one, (41,)))
        (request,) = await _held(g, 2)
        await core.lose()
        await core.listen(g.socket)
        again = (await core.submitted(2))[1]
        assert not core.submits[1].output_token_ids
        gate.set()
        await until(lambda: request.held is None)
        await core.send(first(again), last(again, 41))
        answer = await call
        assert list(answer.outputs[0].token_ids) == [40, 41]
        assert len(answer.prompt_logprobs.positions) == 4
        assert answer.summary.resumed

    serve(core.opened, use)


def test_request_that_is_left_meanwhile_leaves_nothing(gate: threading.Event) -> None:
    core = ScriptedCore()

    async def use(g: Served) -> None:
        call = g.stub.GenerateStream(asking())
        (one,) = await core.submitted()
        await core.send(first(one))
        (request,) = await _held(g, 1)
        call.cancel()
        await until(lambda: core.aborts == [one])
        gate.set()
        await until(lambda: request.held is None)
        assert g.gateway.metrics.num_open == 0

    serve(core.opened, use)


def test_message_that_cannot_be_made_ends_its_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = ScriptedCore()

    def broken(*_: Any) -> Any:
        raise RuntimeError("a secret")

    monkeypatch.setattr(core_link, "prompt_logprobs", broken)

    async def use(g: Served) -> None:
        bad = asyncio.ensure_future(hear(g.stub.GenerateStream(asking())))
        (one,) = await core.submitted()
        await core.send(first(one))
        status = (await bad).status
        assert status is not None
        assert "its log says why" in status.message
        good = asyncio.ensure_future(g.stub.Generate(plain()))
        *_, two = await core.submitted(2)
        await core.send(last(two, 40))
        assert list((await good).outputs[0].token_ids) == [40]

    serve(core.opened, use)


async def _held(g: Served, num_outputs: int) -> list[Any]:
    """The open requests, once so many outputs wait in them."""

    def waiting() -> int:
        return sum(len(request.held or ()) for request in g.gateway.link.open_requests())

    await until(lambda: waiting() == num_outputs)
    return g.gateway.link.open_requests()
