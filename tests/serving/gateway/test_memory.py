"""What is left of a request once it has ended: nothing, though the collector comes by rarely."""

import gc
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import pytest
from quire.engine.startup import Engine
from quire.protos.quire.v1 import inference_pb2 as pb
from quire.serving.gateway.open_request import OpenRequest

from .gateways import Served, real_core, serve, started_engine, until


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with started_engine() as engine:
        yield engine


def asked(max_tokens: int) -> pb.GenerateRequest:
    params = pb.SamplingParams(n=2, max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=[3, 4, 5]), sampling_params=params)


async def answer(stub: Any) -> None:
    await stub.Generate(asked(4))


async def stream(stub: Any) -> None:
    async for _ in stub.GenerateStream(asked(4)):
        pass


async def cancelled_stream(stub: Any) -> None:
    call = stub.GenerateStream(asked(1000))
    await call.read()
    call.cancel()


async def session(stub: Any) -> None:
    """A request that ends, one that is cancelled, and one that is too late."""
    call = stub.Session()
    for number, max_tokens in enumerate((4, 1000, 1000), 1):
        submit = pb.SessionSubmit(id=number, generate=asked(max_tokens))
        submit.timeout_ns = 10**8 if number == 3 else 0
        await call.write(pb.SessionRequest(submit=submit))
    await call.read()
    await call.write(pb.SessionRequest(cancel=pb.SessionCancel(id=2)))
    await call.done_writing()
    while await call.read() is not grpc.aio.EOF:
        pass


@pytest.mark.parametrize("use", [answer, stream, cancelled_stream, session])
def test_ended_request_is_freed_without_the_collector(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, use: Callable[[Any], Awaitable[None]]
) -> None:
    """A request and its choices refer to each other, and the gateway's collector looks at young
    objects every 50,000th: the prompts of more than a thousand requests were kept that had ended.
    """
    made: list[weakref.ref[OpenRequest]] = []

    async def used(served: Served) -> None:
        submit = served.gateway.link.submit

        def noted(request: OpenRequest) -> None:
            made.append(weakref.ref(request))
            submit(request)

        monkeypatch.setattr(served.gateway.link, "submit", noted)
        gc.disable()
        try:
            await use(served.stub)
            assert made
            await until(lambda: not any(one() for one in made))
        finally:
            gc.enable()

    serve(real_core(engine), used)
