"""`quire engine` told to stop, once and twice, with streams open; and a port in use."""

import asyncio
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from quire.protos.quire.v1 import inference_pb2 as pb

from ..supervisor.supervised import is_alive
from .engines import Client, Engine, Result, generate, until_tokens
from .gateways import status_of

# Seconds of work, and how long its end may take beyond that.
NUM_TOKENS = 1000
LONG = generate(max_tokens=NUM_TOKENS)
MOST_STOP_S = 10.0
# Of a client that holds little that it has not read.
SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16))


def with_client(engine: Engine, use: Callable[[Client], Awaitable[Any]]) -> None:
    """Not Engine.run(): it does not go on afterwards."""

    async def run() -> None:
        async with engine.client() as client:
            await use(client)

    asyncio.run(run())


def require_gone(engine: Engine, children: list[int]) -> None:
    assert not any(map(is_alive, children))
    assert list(engine.runtime.iterdir()) == []


def test_sigterm_lets_open_streams_finish() -> None:
    async def use(client: Client) -> None:
        undisturbed = await client.stream(generate(max_tokens=300))
        result, session = Result(), [Result()]
        calls = [
            asyncio.create_task(call)
            for call in (client.stream(LONG, result), client.session([LONG], session))
        ]
        await until_tokens([result, *session], 20)
        short = asyncio.create_task(client.ask(generate(max_tokens=300)))
        await client.until_metrics(lambda m: m["quire_requests_open"] == 3)
        engine.process.send_signal(signal.SIGTERM)
        await client.until_serving(is_so=False)
        assert await client.health() == "NOT_SERVING", "whoever asks is still told"
        refused = await status_of(client.ask(generate()))
        assert refused.code is grpc.StatusCode.UNAVAILABLE
        assert refused.message == "the server is shutting down; use another one"
        assert not any(call.done() for call in calls)
        assert await short == undisturbed
        await asyncio.gather(*calls)
        for one in (result, *session):
            assert one.num_tokens == NUM_TOKENS
            assert one.answers[0].finish_reason == pb.FINISH_REASON_LENGTH

    with Engine() as engine:
        engine.until_said("quire: ready in ")
        children = engine.children()
        with_client(engine, use)
        assert engine.process.wait(MOST_STOP_S) == 0
        require_gone(engine, children)


def test_sigterm_lets_answers_be_read() -> None:
    """A reader who was slower than the engine lost the end of his answer a second after its last
    token, however long the engine might drain; a session that had heard all ended as unavailable.
    """
    wide = generate(n=2, max_tokens=220, logprobs=20)

    async def use(client: Client) -> None:
        undisturbed = await client.stream(wide)
        async with Client(engine.address, options=SMALL_WINDOW) as slow:
            stream, session = slow.stub.GenerateStream(wide), slow.stub.Session()
            submit = pb.SessionSubmit(id=1, generate=wide)
            await session.write(pb.SessionRequest(submit=submit))
            await session.done_writing()
            streamed, in_session = Result(), Result()
            streamed.add(await stream.read())
            await client.until_metrics(lambda m: not m["quire_requests_open"])
            engine.process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                await asyncio.to_thread(engine.process.wait, 2)
            while (delta := await stream.read()) is not grpc.aio.EOF:
                streamed.add(delta)
            while (response := await session.read()) is not grpc.aio.EOF:
                for event in response.events:
                    in_session.add(event.delta)
            assert streamed == in_session == undisturbed

    with Engine() as engine:
        engine.until_said("quire: ready in ")
        with_client(engine, use)
        assert engine.process.wait(MOST_STOP_S) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_second_signal_ends_all_at_once(number: signal.Signals, code: int) -> None:
    async def use(client: Client) -> None:
        result = Result()
        call = asyncio.create_task(status_of(client.stream(LONG, result)))
        await until_tokens([result], 20)
        engine.process.send_signal(number)
        await client.until_serving(is_so=False)
        assert not call.done()
        engine.process.send_signal(number)
        assert await asyncio.to_thread(engine.process.wait, 2) == code
        assert (await call).code is grpc.StatusCode.UNAVAILABLE
        assert result.num_tokens < NUM_TOKENS

    with Engine() as engine:
        engine.until_said("quire: ready in ")
        children = engine.children()
        with_client(engine, use)
        require_gone(engine, children)


def test_port_in_use_is_one_line_and_no_restart() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with Engine(port=port) as engine:
            assert engine.process.wait(MOST_STOP_S) == 2
            said = [line for line in engine.said.splitlines() if line.startswith("quire: ")]
            assert said == [
                f"quire: 127.0.0.1:{port} cannot be listened on: it is in use, or not an address "
                "of this machine; give another --grpc-port or --host"
            ]
            assert "Traceback" not in engine.said
            require_gone(engine, [])
