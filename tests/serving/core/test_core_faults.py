"""A core whose steps fail, stick or find no reader: in this process, where one can replace them."""

import asyncio
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from quire.engine.config import EngineConfig
from quire.engine.core_io import StepOutput, Submission
from quire.engine.errors import StepFailed
from quire.engine.request import FinishReason
from quire.engine.sampling_params import SamplingParams
from quire.engine.startup import Engine, start_engine
from quire.engine.token_checks import TokenLimits
from quire.protos.quire.core.v1 import core_pb2
from quire.serving.core import server as server_module
from quire.serving.core import stream as stream_module
from quire.serving.core.server import CoreServer, listen
from quire.serving.core.stream import Stream
from quire.serving.core_client.client import CoreClient
from quire.serving.core_client.wire import outputs_from_proto, submission_to_proto
from quire.serving.supervisor.command import why_core_is_stuck

from .cores import OPTIONS, WAIT_S, ended_because, finish, is_idle, token_ids, until

SECRET = bytes(range(32))
Use = Callable[[CoreServer, CoreClient], Awaitable[None]]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = start_engine(EngineConfig(**OPTIONS), lambda _: None, secret=SECRET)
    yield made
    made.core.runner.release()


def serve(engine: Engine, use: Use) -> None:
    """Run `use` with a server around the engine and a client of it."""

    async def run(path: Path) -> None:
        server = CoreServer(engine, max_logprobs=-1)
        listener = await listen(server, path)
        client = CoreClient(path)
        try:
            await use(server, client)
        finally:
            await client.close()
            await listener.stop(1)
            await asyncio.to_thread(server.close)

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder) / "core.sock"))


def submission(request_id: str, **params: Any) -> Submission:
    given = {"temperature": 0, "max_tokens": 20, "ignore_eos": True} | params
    return Submission(request_id, tuple(range(3, 30)), SamplingParams(**given), 0)


def failing(engine: Engine, monkeypatch: pytest.MonkeyPatch, num_times: int) -> None:
    """Make so many steps raise, of those that have a running request."""
    forward, left = engine.core.runner.forward, [num_times]

    def raising(*given: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise StepFailed("the device is unwell")
        return forward(*given)

    monkeypatch.setattr(engine.core.runner, "forward", raising)


def test_prefix_hashes_have_the_given_key(engine: Engine) -> None:
    """So that they are the same in the next core."""
    assert engine.core.scheduler.config.secret == SECRET


def test_failed_step_is_made_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(_: CoreServer, client: CoreClient) -> None:
        stream = client.open_stream()
        before = await finish(stream, [submission("before")])
        failing(engine, monkeypatch, 1)
        after = await finish(stream, [submission("after")])
        assert token_ids(before["before"]) == token_ids(after["after"])
        assert (await client.status(5)).counters["num_failed_steps"] == 1

    serve(engine, use)


def test_step_that_fails_twice_ends_its_requests_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(_: CoreServer, client: CoreClient) -> None:
        stream = client.open_stream()
        failing(engine, monkeypatch, 2)
        ((ended,),) = (await finish(stream, [submission("ended")])).values()
        assert ended.finish_reason is FinishReason.ERROR
        assert ended.stop_reason == "its steps failed 2 times; the engine's log says why"
        later = await finish(stream, [submission("later")])
        assert len(token_ids(later["later"])) == 20
        await until(client, is_idle)

    serve(engine, use)


def test_submission_that_the_engine_stumbles_over_ends_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = engine.core.submit

    def stumbling(one: Submission) -> None:
        if one.request_id == "bad":
            raise ZeroDivisionError("a fault of ours")
        submit(one)

    monkeypatch.setattr(engine.core, "submit", stumbling)

    async def use(_: CoreServer, client: CoreClient) -> None:
        outputs = await finish(client.open_stream(), [submission("bad"), submission("good")])
        (bad,) = outputs["bad"]
        assert bad.finish_reason is FinishReason.ERROR
        assert bad.stop_reason == "the engine failed to queue the request; its log says why"
        assert len(token_ids(outputs["good"])) == 20

    serve(engine, use)


def test_submit_that_cannot_be_read_ends_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = stream_module.submission_from_proto

    def stumbling(message: core_pb2.Submit) -> Submission:
        if message.request_id == "bad":
            raise ZeroDivisionError("a fault of ours")
        return read(message)

    monkeypatch.setattr(stream_module, "submission_from_proto", stumbling)

    async def use(_: CoreServer, client: CoreClient) -> None:
        outputs = await finish(client.open_stream(), [submission("bad"), submission("good")])
        (bad,) = outputs["bad"]
        assert bad.finish_reason is FinishReason.ERROR
        assert bad.stop_reason == "the engine failed to read the request; its log says why"
        assert len(token_ids(outputs["good"])) == 20

    serve(engine, use)


def test_failed_loop_ends_the_core_and_no_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the loop ended must not reach the gateway, which resumes it in the next core."""
    step = engine.core.step

    def raising() -> list[StepOutput]:
        if engine.core.metrics.num_steps > first + 3:
            raise SystemError("beyond repair")
        return step()

    first = engine.core.metrics.num_steps
    monkeypatch.setattr(engine.core, "step", raising)

    async def use(server: CoreServer, client: CoreClient) -> None:
        stream = client.open_stream()
        stream.submit([submission("whole")])
        outputs: list[StepOutput] = []

        async def collect() -> None:
            async for some in stream:
                outputs.extend(some)

        reading = asyncio.create_task(collect())
        async with asyncio.timeout(WAIT_S):
            failure = await asyncio.shield(server.failed)
        assert str(failure) == "beyond repair"
        stream.close()
        await asyncio.wait([reading])
        reading.exception()
        assert not any(o.finish_reason for o in outputs)

    serve(engine, use)
    monkeypatch.undo()
    engine.core.abort("whole")
    engine.core.take_outputs()
    while engine.core.has_work:
        engine.core.step()


def test_status_tells_of_a_step_that_does_not_end(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on, forward = threading.Event(), engine.core.runner.forward

    def stuck(*given: Any) -> Any:
        may_go_on.wait(WAIT_S)
        return forward(*given)

    monkeypatch.setattr(engine.core.runner, "forward", stuck)

    async def use(_: CoreServer, client: CoreClient) -> None:
        stream = client.open_stream()
        stream.submit([submission("whole")])
        status = await until(client, lambda s: s.step_age_ns > 1e9)
        assert status.has_work
        why = await why_core_is_stuck(client, 1)
        assert why is not None
        assert why.startswith("a step has not ended for ")
        assert await why_core_is_stuck(client, 30) is None
        may_go_on.set()
        assert (await until(client, is_idle)).step_age_ns == 0

    serve(engine, use)


def test_stream_that_is_not_read_ends_and_its_requests_with_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "WRITE_TIMEOUT_S", 0.3)

    async def use(_: CoreServer, client: CoreClient) -> None:
        stream = client.open_stream()
        wide = [
            submission(f"{i}", max_tokens=300, logprobs=-1, prompt_logprobs=-1) for i in range(64)
        ]
        stream.submit(wide)
        await until(client, lambda s: s.num_running > 8)
        status = await until(client, is_idle)
        assert status.counters["num_output_tokens"] < before + 64 * 300, "it was read after all"
        assert "RESOURCE_EXHAUSTED: the outputs were not read" in await ended_because(stream)
        outputs = await finish(client.open_stream(), [submission("later")])
        assert len(token_ids(outputs["later"])) == 20

    before = engine.core.metrics.num_output_tokens
    serve(engine, use)


class _Loop:
    """Takes requests and aborts, and makes no step."""

    def __init__(self) -> None:
        self.sink: Any = None
        self.aborted: list[str] = []

    def submit(self, _: list[Submission], sink: Any) -> None:
        self.sink = sink

    def abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids


def test_outputs_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "MAX_PENDING", 10)
    loop, wakes = _Loop(), []
    stream = Stream(loop, TokenLimits(100, 100), lambda: wakes.append(1))  # type: ignore[arg-type]
    stream.take(core_pb2.Commands(submits=[submission_to_proto(submission("a"))]))

    def step() -> None:
        loop.sink(StepOutput("a", (1,)))
        loop.sink(StepOutput("a", (2,)))
        stream.on_step()

    for _ in range(5):
        step()
    message = stream.message()
    assert message is not None
    assert len(outputs_from_proto(message)) == 10  # what waited goes out as one message
    for _ in range(100):
        step()
    assert stream.is_overrun
    message = stream.message()
    assert message is not None
    assert len(outputs_from_proto(message)) == 12
    assert stream.message() is None
    stream.end()
    assert loop.aborted == ["a"]


def test_logprobs_that_no_message_can_hold_end_their_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message could not be made, and the stream would end for everyone, again and again."""
    monkeypatch.setattr(stream_module, "MAX_OUTPUT_BYTES", 5000)

    async def use(_: CoreServer, client: CoreClient) -> None:
        wide = submission("wide", prompt_logprobs=-1)
        outputs = await finish(client.open_stream(), [wide, submission("good")])
        (ended,) = outputs["wide"]
        assert ended.finish_reason is FinishReason.ERROR
        assert "ask for fewer prompt_logprobs" in str(ended.stop_reason)
        assert len(token_ids(outputs["good"])) == 20
        await until(client, is_idle)

    serve(engine, use)


def test_commands_after_the_end_of_a_stream_are_dropped() -> None:
    """They would abort requests of the stream that took its place."""
    loop = _Loop()
    stream = Stream(loop, TokenLimits(100, 100), lambda: None)  # type: ignore[arg-type]
    stream.end()
    stream.take(core_pb2.Commands(submits=[submission_to_proto(submission("a"))]))
    assert loop.sink is None
