"""What `quire engine` must refuse while it serves others: strangers, messages without measure, more
than its queue holds, templates that do not end.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import pytest
from quire.protos.quire.v1 import inference_pb2 as pb

from .certificates import KEY, Files
from .engines import Client, Engine, Result, generate, until_tokens
from .gateways import Status, status_of

MAX_RUNNING, MAX_QUEUED = 4, 3
# Of the rendering limit of 1 s, and of half as many threads as there are templates.
MOST_RENDER_S = 6.0
# Of a stream meanwhile, also on a busy machine; it has some 700.
LEAST_DELTAS = 60
_LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files.make(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def engine(files: Files) -> Iterator[Engine]:
    """Of few rows and places, with keys and certificates on both sides, and a bad template."""
    flags = {
        "--max-num-seqs": MAX_RUNNING,
        "--max-num-queued-reqs": MAX_QUEUED,
        "--chat-template": _LOOP,
    }
    given = [str(part) for flag in flags.items() for part in flag]
    with Engine(*given, *files.flags(), connect=files.connect) as engine:
        yield engine


def beside_a_stream(engine: Engine, use: Callable[[Client], Awaitable[Any]]) -> None:
    """While it happens, and with no change, somebody else is answered."""
    request = generate(max_tokens=300)

    async def used(client: Client) -> None:
        undisturbed, result = await client.stream(request), Result()
        reading = asyncio.create_task(client.stream(request, result))
        await until_tokens([result], 20)
        await use(client)
        assert await reading == undisturbed

    engine.run(used)


@pytest.mark.parametrize(
    ("trusts", "shows"),
    [("other", "ours-client"), ("ours", None), ("ours", "other-client"), (None, None)],
    ids=["other authority", "no certificate", "other certificate", "no TLS"],
)
def test_connection_that_is_not_ours_is_refused(
    engine: Engine, files: Files, trusts: str | None, shows: str | None
) -> None:
    credentials = None if trusts is None else files.credentials(trusts, shows)

    async def use(_: Client) -> None:
        async with Client(engine.address, credentials=credentials, key=KEY) as stranger:
            status = await status_of(stranger.ask(generate()))
            assert status.code is grpc.StatusCode.UNAVAILABLE

    beside_a_stream(engine, use)


@pytest.mark.parametrize("key", ["sesam", None])
def test_wrong_key_is_refused(engine: Engine, files: Files, key: str | None) -> None:
    credentials = files.credentials("ours", "ours-client")

    async def use(client: Client) -> None:
        async with Client(engine.address, credentials=credentials, key=key) as stranger:
            assert await stranger.is_serving(), "health needs no key"
            session = stranger.stub.Session(metadata=stranger.metadata)
            for call in (stranger.ask(generate()), session.read()):
                status = await status_of(call)
                assert status.code is grpc.StatusCode.UNAUTHENTICATED
                assert status.message.startswith("the key is missing or wrong; send the metadata")

    beside_a_stream(engine, use)


def test_message_without_measure_is_refused(engine: Engine) -> None:
    async def use(client: Client) -> None:
        status = await status_of(client.ask(generate("x" * (33 << 20))))
        assert status.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in status.message

    beside_a_stream(engine, use)


def test_full_queue_refuses_with_a_delay_and_recovers(engine: Engine) -> None:
    async def use(client: Client) -> None:
        running = []
        for _ in range(MAX_RUNNING):  # one after the other: they must not fill the queue
            result = Result()
            running.append(asyncio.create_task(client.stream(generate(max_tokens=1900), result)))
            await until_tokens([result], 1)
        waiting = [asyncio.create_task(client.ask(generate())) for _ in range(MAX_QUEUED)]
        await client.until_metrics(lambda m: m["quire_requests_queued"] == MAX_QUEUED)
        status = await status_of(client.ask(generate()))
        assert status.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert f"at most {MAX_QUEUED} may (max_num_queued_reqs); try again in" in status.message
        assert status.retry_after_s is not None
        assert 0.1 <= status.retry_after_s <= 60
        in_session = await session_error(client, generate())
        assert in_session.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert in_session.retry_after_ns >= 1e8
        for one in running:
            one.cancel()
        assert len({tuple((await one).answers[0].token_ids) for one in waiting}) == 1
        assert (await client.ask(generate())).num_tokens == 48
        await asyncio.gather(*running, return_exceptions=True)
        rejected = (await client.metrics())["quire_requests_rejected_total/max_num_queued_reqs"]
        assert rejected == 2

    engine.run(use)


async def session_error(client: Client, request: pb.GenerateRequest) -> pb.SessionError:
    call = client.stub.Session(metadata=client.metadata)
    await call.write(pb.SessionRequest(submit=pb.SessionSubmit(id=1, generate=request)))
    (event,) = (await call.read()).events
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    error: pb.SessionError = event.error
    return error


def test_template_that_does_not_end_is_refused_and_streams_go_on(engine: Engine) -> None:
    """More of them than there are threads for prompts."""

    async def use(client: Client) -> None:
        arrivals: list[float] = []

        async def flow() -> None:
            request = generate(max_tokens=1900)
            async for _ in client.stub.GenerateStream(request, metadata=client.metadata):
                arrivals.append(time.monotonic())

        async def chat() -> Status:
            message = pb.ChatMessage(role="user", content="Hello!")
            request = pb.ChatRequest(messages=[message])
            return await status_of(client.stub.Chat(request, metadata=client.metadata))

        flowing = asyncio.create_task(flow())
        await client.until_metrics(lambda m: m["quire_generation_tokens_total"] and arrivals)
        began, first = time.monotonic(), len(arrivals)
        statuses = await asyncio.gather(*(chat() for _ in range(MAX_QUEUED)))
        took_s, last = time.monotonic() - began, len(arrivals)
        flowing.cancel()
        for status in statuses:
            assert status.code is grpc.StatusCode.INVALID_ARGUMENT
            assert "ran longer than 1 s" in status.message
        assert took_s < MOST_RENDER_S
        # Rendered on the event loop, each of them would let one merged delta pass.
        assert last - first > LEAST_DELTAS, f"{last - first} deltas in {took_s:.1f} s of rendering"
        await asyncio.gather(flowing, return_exceptions=True)

    engine.run(use)
