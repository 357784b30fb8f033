"""What is bounded: what waits for the engine, what waits for a reader, and the time of a drain."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from quire.engine.core_io import PositionLogprobs, StepOutput
from quire.engine.request import FinishReason
from quire.protos.quire.v1 import inference_pb2 as pb
from quire.serving.gateway import intake, outbox

from .gateways import ScriptedCore, Served, SessionClient, hear, serve, status_of, submits, until

RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
REQUESTS_2, TOKENS_99 = {"max_num_queued_reqs": 2}, {"max_num_queued_tokens": 99}
JAPANESE = pb.GenerateRequest(text="日" * 9)
# Once text is said, so that nothing is held back.
WIDE = 512


def request(num_tokens: int = 1, **params: Any) -> pb.GenerateRequest:
    ids = pb.TokenIds(ids=[50] * num_tokens)
    return pb.GenerateRequest(token_ids=ids, sampling_params=pb.SamplingParams(**params))


def token(core_id: str, **fields: Any) -> StepOutput:
    return StepOutput(core_id, (40,), **fields)


def wide(core_id: str) -> StepOutput:
    """A token that takes 12 KB of what may wait, and as much on the wire."""
    top = PositionLogprobs(40, -1.0, 1, np.arange(WIDE, dtype=np.int32), np.zeros(WIDE, np.float32))
    return token(core_id, logprobs=(top,))


def last(core_id: str) -> StepOutput:
    return token(core_id, finish_reason=FinishReason.LENGTH)


def called(g: Served, rpc: str) -> Any:
    """A call of one request, which in a session has the id 1."""
    if rpc == "Session":
        return g.stub.Session(submits(pb.SessionSubmit(id=1, generate=request())))
    return getattr(g.stub, rpc)(request())


# The queue


@asynccontextmanager
async def waiting(
    g: Served, core: ScriptedCore, *requests: pb.GenerateRequest
) -> AsyncIterator[Any]:
    """Calls that wait for their first tokens; they end with the `async with`."""
    calls, num_choices = [], len(core.submits)
    for one in requests:
        num_choices += max(1, one.sampling_params.n)
        calls.append(g.stub.GenerateStream(one))
        await core.submitted(num_choices)
    yield calls
    for call in calls:
        call.cancel()


@pytest.mark.parametrize(
    ("limits", "those", "refused", "option"),
    [
        (REQUESTS_2, [request()] * 2, request(), "max_num_queued_reqs"),
        (REQUESTS_2, [request()], request(n=2), "max_num_queued_reqs"),
        (TOKENS_99, [request(60)], request(160), "max_num_queued_tokens"),
        (TOKENS_99, [request(30, n=2)], request(20, n=2), "max_num_queued_tokens"),
        # Few characters, and many tokens: known once it is encoded.
        (TOKENS_99, [request(90)], JAPANESE, "max_num_queued_tokens"),
    ],
)
def test_full_queue_refuses_with_a_delay_and_open_streams_go_on(
    limits: dict[str, int], those: list[Any], refused: pb.GenerateRequest, option: str
) -> None:
    core = ScriptedCore()

    async def use(g: Served) -> None:
        async with waiting(g, core, request()) as (running,):
            (core_id,) = await core.submitted()
            await core.send(token(core_id))
            await running.read()
            async with waiting(g, core, *those):
                metrics, num_open = g.gateway.metrics, g.gateway.metrics.num_open
                queued = metrics.num_queued, metrics.num_queued_tokens
                for rpc in (g.stub.Generate, lambda m: g.stub.GenerateStream(m).read()):
                    status = await status_of(rpc(refused))
                    assert status.code is RESOURCE_EXHAUSTED
                    assert option in status.message
                    assert 0.1 <= (status.retry_after_s or 0) <= 60
                async with SessionClient(g.stub) as client:
                    await client.submit(1, refused)
                    error = (await client.ended(1)).error
                    assert error.code == RESOURCE_EXHAUSTED.value[0]
                    assert error.retry_after_ns >= 1e8
                assert metrics.num_open == num_open
                assert (metrics.num_queued, metrics.num_queued_tokens) == queued
                assert metrics.rejected_by_reason[option] == 3
                await core.send(token(core_id))
                assert (await running.read()).token_ids == [40]
            async with waiting(g, core, refused):
                pass  # those that waited have gone

    serve(core.opened, use, **limits)


def test_request_is_let_in_when_nobody_waits() -> None:
    """However large: else it could never run. One that has its first token does not wait."""
    core = ScriptedCore()

    async def use(g: Served) -> None:
        calls = []
        for number in range(1, 4):
            calls.append(g.stub.GenerateStream(request(1000, n=3)))
            *_, core_id = await core.submitted(3 * number)
            await core.send(token(core_id))
            await calls[-1].read()
            assert g.gateway.metrics.num_queued == 0
        await core.send(*(last(submit.request_id) for submit in core.submits))
        for call in calls:
            assert (await hear(call)).messages[-1].summary.usage.prompt_tokens == 1000

    serve(core.opened, use, max_num_queued_reqs=1, max_num_queued_tokens=1)


def test_delay_follows_from_how_many_start() -> None:
    core = ScriptedCore()

    async def use(g: Served) -> None:
        async with waiting(g, core, *[request()] * 20):
            before = await status_of(g.stub.Generate(request()))
            await core.send(*(token(submit.request_id) for submit in core.submits[:19]))
            await until(lambda: g.gateway.metrics.num_queued == 1)
            async with waiting(g, core, *[request()] * 19):
                after = await status_of(g.stub.Generate(request()))
        assert before.retry_after_s == 1.0  # nothing is known yet
        assert after.retry_after_s == pytest.approx(10 * 2 / 19)  # a tenth of 20, at 19 in 10 s

    serve(core.opened, use, max_num_queued_reqs=20)


async def refused_in_prepare(g: Served, core: ScriptedCore) -> None:
    await status_of(g.stub.Generate(request(temperature=9)))


async def refused_by_id(g: Served, core: ScriptedCore) -> None:
    first = request()
    first.request_id = "same"
    async with waiting(g, core, first):
        await core.send(token((await core.submitted())[0]))
        await until(lambda: g.gateway.metrics.num_queued == 0)
        status = await status_of(g.stub.Generate(first))
        assert status.code is grpc.StatusCode.ALREADY_EXISTS
        assert (g.gateway.metrics.num_queued, g.gateway.metrics.num_open) == (0, 1)


async def cancelled_before_its_first_token(g: Served, core: ScriptedCore) -> None:
    async with waiting(g, core, request(n=2)):
        pass


async def failed_in_the_core(g: Served, core: ScriptedCore) -> None:
    async with waiting(g, core, request(n=2)) as (call,):
        first, second = await core.submitted(2)
        failed = {"finish_reason": FinishReason.ERROR, "stop_reason": "unwell"}
        await core.send(*(StepOutput(one, (), **failed) for one in (first, second)))
        deltas = (await hear(call)).messages
        assert [delta.stop_reason.text for delta in deltas] == ["unwell"] * 2


async def timed_out(g: Served, core: ScriptedCore) -> None:
    async with SessionClient(g.stub) as client:
        await client.submit(1, request(), timeout_ns=20_000_000)
        await client.ended(1)


async def started(g: Served, core: ScriptedCore) -> None:
    async with waiting(g, core, request(n=2)):
        await core.send(token((await core.submitted(2))[1]))
        await until(lambda: g.gateway.metrics.num_queued == 0)
        assert g.gateway.metrics.num_open == 1


WAYS = [refused_in_prepare, refused_by_id, cancelled_before_its_first_token]


@pytest.mark.parametrize("way", [*WAYS, failed_in_the_core, timed_out, started])
def test_place_is_given_back(way: Any) -> None:
    core = ScriptedCore()

    async def use(g: Served) -> None:
        await way(g, core)
        metrics = g.gateway.metrics
        await until(lambda: (metrics.num_queued, metrics.num_queued_tokens) == (0, 0))

    serve(core.opened, use)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Preparing of a request waits for it."""
    may_go_on, prepare = threading.Event(), intake.prepare

    def waiting(*given: Any) -> Any:
        may_go_on.wait(30)
        return prepare(*given)

    monkeypatch.setattr(intake, "prepare", waiting)
    yield may_go_on
    may_go_on.set()


def test_request_that_is_prepared_can_be_cancelled_aborted_and_timed_out(
    held: threading.Event,
) -> None:
    core = ScriptedCore()

    async def use(g: Served) -> None:
        metrics = g.gateway.metrics
        async with SessionClient(g.stub) as client:
            for session_id, name in enumerate(("cancelled", "late", "aborted"), 1):
                one = request()
                one.request_id = name
                await client.submit(session_id, one, timeout_ns=int(name == "late"))
            end = await client.ended(2)
            assert end.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
            await client.cancel(1)
            await until(lambda: (metrics.num_open, metrics.num_queued) == (1, 1))
            ids = ["aborted", "late", "unknown"]
            await g.stub.Abort(pb.AbortRequest(request_ids=ids))
            held.set()
            end = await client.ended(3)
            assert end.delta.finish_reason == pb.FINISH_REASON_ABORT
            assert {event.id for event in client.events} == {2, 3}
        await until(lambda: set(core.aborts) == {s.request_id for s in core.submits})

    serve(core.opened, use)


@pytest.mark.parametrize("rpc", ["Generate", "GenerateStream", "Session"])
def test_client_that_goes_while_its_request_is_prepared_leaves_nothing(
    held: threading.Event, rpc: str
) -> None:
    core = ScriptedCore()

    async def use(g: Served) -> None:
        metrics, call = g.gateway.metrics, called(g, rpc)
        await until(lambda: metrics.num_open == 1)
        call.cancel()
        await until(lambda: (metrics.num_open, metrics.num_queued) == (0, 0))
        held.set()

    serve(core.opened, use)
    assert not core.submits


# Slow readers


@pytest.mark.parametrize("rpc", ["Session", "GenerateStream"])
def test_reader_that_comes_back_in_time_gets_all_in_fewer_messages(
    monkeypatch: pytest.MonkeyPatch, rpc: str
) -> None:
    monkeypatch.setattr(outbox, "MAX_WAITING_BYTES", 1 << 30)
    core, num_outputs = ScriptedCore(), 100

    async def use(g: Served) -> None:
        call = called(g, rpc)
        (core_id,) = await core.submitted()
        for number in range(num_outputs):
            await core.send(wide(core_id))
            await until(lambda n=number: g.gateway.metrics.num_generation_tokens > n)
        await core.send(last(core_id))
        heard = await hear(call)
        is_session = rpc == "Session"
        deltas = [e.delta for e in heard.events] if is_session else heard.messages
        assert heard.status is None
        assert len(deltas) < num_outputs
        assert "".join(delta.text for delta in deltas) == "C" * (num_outputs + 1)
        assert [i for delta in deltas for i in delta.token_ids] == [40] * (num_outputs + 1)
        assert sum(len(delta.logprobs) for delta in deltas) == num_outputs
        assert deltas[-1].HasField("summary")
        assert [bool(delta.request_id) for delta in deltas] == [True] + [False] * (len(deltas) - 1)

    serve(core.opened, use)


@pytest.mark.parametrize("rpc", ["GenerateStream", "Generate"])
def test_reader_that_does_not_read_is_given_up_and_others_go_on(rpc: str) -> None:
    """A call that wants the answer at once has none to read."""
    core = ScriptedCore()

    async def use(g: Served) -> None:
        slow = called(g, rpc)
        await core.submitted()
        other = g.stub.GenerateStream(request())
        slow_id, other_id = await core.submitted(2)
        for _ in range(80):
            await core.send(wide(slow_id), token(other_id))
            assert list((await other.read()).token_ids) == [40]
        await core.send(last(slow_id), last(other_id))
        assert (await hear(other)).status is None
        if rpc == "Generate":
            assert (await slow).summary.usage.completion_tokens == 81
            return
        heard = await hear(slow)
        assert heard.status is not None
        assert heard.status.code is RESOURCE_EXHAUSTED
        assert heard.status.message.startswith("more than 256 KiB of the answer were not read")
        assert 0 < sum(len(delta.token_ids) for delta in heard.messages) < 80
        assert core.aborts == [slow_id]
        assert g.gateway.metrics.num_cancelled_slow == 1

    serve(core.opened, use)


def test_session_that_is_not_read_loses_only_the_request_that_is_too_much() -> None:
    core = ScriptedCore()

    async def use(g: Served) -> None:
        both = (pb.SessionSubmit(id=i, generate=request()) for i in (1, 2))
        call = g.stub.Session(submits(*both))
        await core.submitted(2)
        core_ids = [c.core_id for c in g.gateway.link._choices.values()]
        for _ in range(80):
            await core.send(wide(core_ids[0]), token(core_ids[1]))
            await asyncio.sleep(0)
        await until(lambda: core.aborts == core_ids[:1])
        await core.send(last(core_ids[1]))
        heard = await hear(call)
        assert heard.status is None
        ends = [e for e in heard.events if e.HasField("error") or e.delta.finish_reason]
        assert len(ends) == 2
        (error,) = (end.error for end in ends if end.HasField("error"))
        assert error.code == RESOURCE_EXHAUSTED.value[0]
        (good,) = {end.id for end in ends if not end.HasField("error")}
        ids = [i for e in heard.events if e.id == good for i in e.delta.token_ids]
        assert ids == [40] * 81

    serve(core.opened, use)


@pytest.mark.parametrize("rpc", ["Session", "GenerateStream"])
def test_message_that_is_not_taken_ends_its_call(monkeypatch: pytest.MonkeyPatch, rpc: str) -> None:
    monkeypatch.setattr(outbox, "MAX_WAITING_BYTES", 1 << 30)
    monkeypatch.setattr(outbox, "WRITE_TIMEOUT_S", 0.2)
    core = ScriptedCore()

    async def use(g: Served) -> None:
        call = called(g, rpc)
        (core_id,) = await core.submitted()
        while not core.aborts:
            await core.send(wide(core_id))
            await asyncio.sleep(0.01)
        assert core.aborts == [core_id]
        status = (await hear(call)).status
        assert status is not None
        assert status.code is RESOURCE_EXHAUSTED
        assert status.message == "a message was not read for 0.2 s; read faster"

    serve(core.opened, use)


@pytest.mark.parametrize("rpc", ["Session", "GenerateStream"])
@pytest.mark.parametrize(("num_tokens", "is_whole"), [(2, True), (3, False), (30, False)])
def test_answer_that_ends_in_the_step_that_gives_it_up_is_whole_or_an_error(
    monkeypatch: pytest.MonkeyPatch, rpc: str, num_tokens: int, is_whole: bool
) -> None:
    """Pieces were dropped, the request was done before it could be ended, and its reader was told
    neither: a stream ended with OK, and a session waited for its end for ever.
    """
    monkeypatch.setattr(outbox, "MAX_WAITING_BYTES", 40)  # two tokens
    core = ScriptedCore()

    async def use(g: Served) -> None:
        reading = asyncio.create_task(hear(called(g, rpc)))
        (core_id,) = await core.submitted()
        await core.send(*[token(core_id)] * num_tokens, last(core_id))
        heard = await reading
        code = 0 if heard.status is None else heard.status.code.value[0]
        finish = heard.messages[-1]
        if rpc == "Session":
            assert code == 0
            code, finish = heard.events[-1].error.code, heard.events[-1].delta
        assert code == (0 if is_whole else RESOURCE_EXHAUSTED.value[0])
        assert finish.finish_reason == (pb.FINISH_REASON_LENGTH if is_whole else 0)

    serve(core.opened, use)
