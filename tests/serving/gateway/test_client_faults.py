"""Clients of `quire engine` that vanish or do not read: their requests end, the others go on."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import grpc
import pytest
from quire.protos.quire.v1 import inference_pb2 as pb

from .engines import Client, Engine, Proxy, Result, generate, until_tokens
from .gateways import status_of

# Under way for seconds, whatever the machine does.
LONG = generate(n=4, max_tokens=1900)
# Three times what the buffers of a connection hold, 4 MiB.
WIDE = generate(n=16, max_tokens=1900, logprobs=20)
# From a client's end to that of its requests.
MOST_ABORT_S = 3.0
MOST_GIVE_UP_S = 20.0

_READER = """
import sys, grpc
from quire.protos.quire.v1 import inference_pb2, inference_pb2_grpc
address, request = sys.argv[1], inference_pb2.GenerateRequest.FromString(bytes.fromhex(sys.argv[2]))
with grpc.insecure_channel(address) as channel:
    for _ in inference_pb2_grpc.InferenceStub(channel).GenerateStream(request):
        print("delta", flush=True)
"""

Reading = Callable[[str, pb.GenerateRequest], AbstractAsyncContextManager[Any]]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine() as engine:
        yield engine


# A request under way while the `with` lasts, and then a client that is gone


@asynccontextmanager
async def process(
    address: str, request: pb.GenerateRequest
) -> AsyncIterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", _READER, address, request.SerializeToString().hex()],
        stdout=subprocess.PIPE,
    ) as reader:
        try:
            assert reader.stdout is not None
            await asyncio.to_thread(reader.stdout.readline)
            yield reader
        finally:
            reader.kill()


@asynccontextmanager
async def channel(address: str, request: pb.GenerateRequest) -> AsyncIterator[None]:
    async with Client(address) as client:
        call = client.stub.GenerateStream(request)
        await call.read()
        yield


@asynccontextmanager
async def connection(address: str, request: pb.GenerateRequest) -> AsyncIterator[None]:
    """One that is reset."""
    async with Proxy(address) as proxy, channel(proxy.address, request):
        yield
        proxy.reset()


@pytest.mark.parametrize("reading", [process, channel, connection])
def test_vanished_client_ends_its_request(engine: Engine, reading: Reading) -> None:
    async def use(client: Client) -> None:
        aborts = "quire_requests_finished_total/abort"
        before = (await client.metrics())[aborts]
        async with reading(engine.address, LONG):
            await client.until_metrics(lambda m: m["quire_requests_running"] == 4)
        await client.until_metrics(
            lambda m: m[aborts] == before + 1 and m["quire_kv_pages_free"] == m["quire_kv_pages"],
            MOST_ABORT_S,
        )
        metrics = await client.metrics()
        assert metrics["quire_requests_open"] == metrics["quire_requests_running"] == 0

    engine.run(use)


def test_clients_that_vanish_do_not_change_the_answer_of_another(engine: Engine) -> None:
    async def use(client: Client) -> None:
        request = generate(max_tokens=600, logprobs=1)
        undisturbed, result = await client.stream(request), Result()
        async with channel(engine.address, LONG), channel(engine.address, LONG):
            reading = asyncio.create_task(client.stream(request, result))
            await until_tokens([result], 50)
        assert await reading == undisturbed

    engine.run(use)


# Readers that stop


async def read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def slow_readers(client: Client) -> float:
    return (await client.metrics())["quire_slow_readers_cancelled_total"]


async def require_given_up(client: Client, before: float, undisturbed: Result) -> None:
    """While they do not read: others are answered, and then they are ended."""
    assert await client.stream(generate(max_tokens=200)) == undisturbed
    await client.until_metrics(
        lambda m: m["quire_slow_readers_cancelled_total"] > before, MOST_GIVE_UP_S
    )
    await client.until_metrics(
        lambda m: not (m["quire_requests_open"] or m["quire_requests_running"])
    )


def test_stream_that_is_not_read_is_given_up(engine: Engine) -> None:
    async def use(client: Client) -> None:
        undisturbed = await client.stream(generate(max_tokens=200))
        before = await slow_readers(client)
        async with engine.client() as stalled:
            call = stalled.stub.GenerateStream(WIDE)
            await call.read()
            await require_given_up(client, before, undisturbed)
            status = await status_of(read_all(call))
        assert status.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert status.message.startswith("more than 256 KiB of the answer were not read")

    engine.run(use)


def test_session_that_is_not_read_is_given_up_and_can_go_on(engine: Engine) -> None:
    async def use(client: Client) -> None:
        undisturbed = await client.stream(generate(max_tokens=200))
        before = await slow_readers(client)
        async with engine.client() as stalled:
            call = stalled.stub.Session()
            await submit(call, 1, WIDE)
            await call.read()
            await require_given_up(client, before, undisturbed)
            error = await last_event(call, 1)
            assert error.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            await submit(call, 2, generate())
            assert (await last_event(call, 2)).delta.finish_reason == pb.FINISH_REASON_LENGTH
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF

    engine.run(use)


async def submit(call: Any, session_id: int, request: pb.GenerateRequest) -> None:
    message = pb.SessionSubmit(id=session_id, generate=request)
    await call.write(pb.SessionRequest(submit=message))


async def last_event(call: Any, session_id: int) -> pb.SessionEvent:
    while True:
        response = await call.read()
        assert response is not grpc.aio.EOF
        for event in response.events:
            if event.id == session_id and (
                event.HasField("error") or event.delta.HasField("summary")
            ):
                return event


@pytest.mark.slow
def test_stopped_process_is_given_up(engine: Engine) -> None:
    """Nothing of it reads: the buffers of the kernel are full too."""

    async def use(client: Client) -> None:
        undisturbed = await client.stream(generate(max_tokens=200))
        before = await slow_readers(client)
        async with process(engine.address, WIDE) as reader:
            reader.send_signal(signal.SIGSTOP)
            await require_given_up(client, before, undisturbed)

    engine.run(use)
