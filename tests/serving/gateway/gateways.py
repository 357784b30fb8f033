"""A gateway in this process, in front of a real core or of one that a test speaks for."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import uvloop
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from quire.engine.config import EngineConfig
from quire.engine.core_io import StepOutput
from quire.engine.startup import Engine, start_engine
from quire.protos.quire.core.v1 import core_pb2, core_pb2_grpc
from quire.protos.quire.v1 import inference_pb2 as pb
from quire.protos.quire.v1 import inference_pb2_grpc
from quire.serving.core.server import CoreServer, listen
from quire.serving.core_client.client import CHANNEL_OPTIONS, CoreClient
from quire.serving.core_client.wire import outputs_to_proto
from quire.serving.gateway.gateway import Gateway, GatewayOptions

from ..core.cores import OPTIONS, is_idle
from ..core.cores import until as core_until

SECRET = bytes(range(32))
WAIT_S = 60.0  # for whatever is to come
_POLL_S = 0.005
# What a client takes that does not read: 64 KiB. gRPC lets it grow with the speed of the network.
_SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 64 << 10))
_CLIENT_OPTIONS = (
    *_SMALL_WINDOW,
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Channels to one address would share a connection.
    ("grpc.use_local_subchannel_pool", 1),
)

Core = Callable[[Path], AbstractAsyncContextManager[Any]]
Use = Callable[["Served"], Awaitable[Any]]


@contextmanager
def started_engine(**options: Any) -> Iterator[Engine]:
    engine = start_engine(EngineConfig(**OPTIONS | options), lambda _: None, secret=SECRET)
    yield engine
    engine.core.runner.release()


def real_core(engine: Engine) -> Core:
    """A core server around the engine, to be opened on a socket."""

    @asynccontextmanager
    async def opened(socket: Path) -> AsyncIterator[CoreServer]:
        server = CoreServer(engine, max_logprobs=-1)
        listener = await listen(server, socket)
        try:
            yield server
        finally:
            await listener.stop(1)
            await asyncio.to_thread(server.close)

    return opened


class ScriptedCore(core_pb2_grpc.CoreServicer):
    """A core that says what a test tells it to, and notes what it is told."""

    def __init__(self) -> None:
        self.status = core_pb2.GetStatusResponse(
            num_pages=9, num_free_pages=9, max_model_len=2048, vocab_size=512
        )
        self.is_silent = False  # whether questions for its status are left without an answer
        self.submits: list[core_pb2.Submit] = []
        self.aborts: list[str] = []
        self._context: Any = None
        self._listener: grpc.aio.Server | None = None

    @asynccontextmanager
    async def opened(self, socket: Path) -> AsyncIterator["ScriptedCore"]:
        await self.listen(socket)
        try:
            yield self
        finally:
            await self.lose()

    @asynccontextmanager
    async def absent(self, socket: Path) -> AsyncIterator["ScriptedCore"]:
        """Until it is told to listen()."""
        try:
            yield self
        finally:
            await self.lose()

    async def listen(self, socket: Path) -> None:
        """Be there, also again."""
        self._listener = grpc.aio.server(options=CHANNEL_OPTIONS)
        core_pb2_grpc.add_CoreServicer_to_server(self, self._listener)
        self._listener.add_insecure_port(f"unix:{socket}")
        await self._listener.start()

    async def lose(self) -> None:
        """Be gone, with every stream."""
        self._context = None
        if self._listener is not None:
            await self._listener.stop(None)
            self._listener = None

    async def send(self, *outputs: StepOutput) -> None:
        """One message: what one step brought."""
        await until(lambda: self._context is not None)
        await self._context.write(outputs_to_proto(outputs))

    async def submitted(self, num_submits: int = 1) -> list[str]:
        """Once there were so many in all: their ids."""
        await until(lambda: len(self.submits) >= num_submits)
        return [submit.request_id for submit in self.submits]

    async def Run(self, requests: AsyncIterator[core_pb2.Commands], context: Any) -> None:
        self._context = context
        async for commands in requests:
            self.submits += commands.submits
            self.aborts += commands.aborts

    async def GetStatus(
        self, request: core_pb2.GetStatusRequest, context: Any
    ) -> core_pb2.GetStatusResponse:
        await until(lambda: not self.is_silent)
        return self.status


@dataclass
class Served:
    """A gateway that serves, a client of it, and the core behind it."""

    gateway: Gateway
    address: str
    channel: grpc.aio.Channel
    stub: Any
    core: Any  # what was opened: a CoreServer or a ScriptedCore
    core_client: CoreClient
    socket: Path

    async def until_idle(self) -> None:
        """Nothing is open, waits, runs or holds a page."""
        metrics, link = self.gateway.metrics, self.gateway.link
        await until(lambda: not (metrics.num_open or metrics.num_queued or link.num_open))
        assert metrics.num_queued_tokens == 0
        if isinstance(self.core, CoreServer):
            await core_until(self.core_client, is_idle)


@asynccontextmanager
async def open_gateway(
    core: Core, *, engine: Mapping[str, Any] | None = None, has_served: bool = True, **serve: Any
) -> AsyncIterator[Served]:
    """engine and serve: options beside those of every test. has_served: wait until it does."""
    with tempfile.TemporaryDirectory(prefix="quire") as folder:
        socket = Path(folder) / "core.sock"
        async with core(socket) as opened:
            options = {"grpc_port": 0} | serve
            gateway = Gateway(GatewayOptions(OPTIONS | (engine or {}), options, socket, SECRET))
            core_client = CoreClient(socket)
            try:
                address = await gateway.start()
                if has_served:
                    async with asyncio.timeout(WAIT_S):
                        await gateway.health.has_served.wait()
                async with client(address) as channel:
                    stub = inference_pb2_grpc.InferenceStub(channel)
                    yield Served(gateway, address, channel, stub, opened, core_client, socket)
            finally:
                await gateway.close()
                await core_client.close()


def client(address: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.aio.Channel:
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=_CLIENT_OPTIONS)
    return grpc.aio.secure_channel(address, credentials, options=_CLIENT_OPTIONS)


def serve(core: Core, use: Use, **options: Any) -> None:
    """Run `use` with a gateway of its own; after it nothing may be left open."""
    with stage(core, **options) as run:
        run(use)


@contextmanager
def stage(core: Core, **options: Any) -> Iterator[Callable[[Use], Any]]:
    """A loop with a gateway in it. What is given runs a test's coroutine, again and again."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        stack = AsyncExitStack()
        served = runner.run(stack.enter_async_context(open_gateway(core, **options)))
        num_tasks = runner.run(_num_tasks())

        async def used(use: Use) -> Any:
            async with asyncio.timeout(WAIT_S):
                result = await use(served)
                await served.until_idle()
                if options.get("has_served", True):
                    await until(lambda: len(asyncio.all_tasks()) <= num_tasks)
            return result

        try:
            yield lambda use: runner.run(used(use))
        finally:
            runner.run(stack.aclose())


async def _num_tasks() -> int:
    return len(asyncio.all_tasks())


async def until(is_so: Callable[[], Any]) -> None:
    """Return once it is so."""
    async with asyncio.timeout(WAIT_S):
        while not is_so():
            await asyncio.sleep(_POLL_S)


@dataclass(frozen=True)
class Status:
    """What an rpc ended with: the fields of BadRequest, and the seconds of RetryInfo."""

    code: grpc.StatusCode
    message: str
    fields: tuple[str, ...] = ()
    retry_after_s: float | None = None


@dataclass(frozen=True)
class Heard:
    """What came of a stream, and what it ended with if that was not OK."""

    messages: list[Any]
    status: Status | None = None

    @property
    def events(self) -> list[pb.SessionEvent]:
        """Of a session."""
        return [event for message in self.messages for event in message.events]


class SessionClient:
    """A client of one session that says and hears at its own pace. Use it in an `async with`."""

    def __init__(self, stub: Any, **options: Any) -> None:
        self.call = stub.Session(**options)
        self.events: list[pb.SessionEvent] = []
        self.status: Status | None = None  # what the session ended with, if not OK

    async def __aenter__(self) -> "SessionClient":
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.call.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def submit(
        self, session_id: int, request: pb.GenerateRequest | pb.ChatRequest, **fields: Any
    ) -> None:
        kind = "chat" if isinstance(request, pb.ChatRequest) else "generate"
        submit = pb.SessionSubmit(id=session_id, **{kind: request}, **fields)
        await self.call.write(pb.SessionRequest(submit=submit))

    async def cancel(self, session_id: int) -> None:
        await self.call.write(pb.SessionRequest(cancel=pb.SessionCancel(id=session_id)))

    async def half_close(self) -> None:
        """Say no more, and hear the session's end."""
        await self.call.done_writing()
        await self._reading

    def of(self, session_id: int) -> list[pb.SessionEvent]:
        return [event for event in self.events if event.id == session_id]

    async def ended(self, session_id: int) -> pb.SessionEvent:
        """The first end of a request."""
        await until(lambda: any(map(is_end, self.of(session_id))))
        return next(filter(is_end, self.of(session_id)))

    async def _read(self) -> None:
        try:
            async for response in self.call:
                assert response.events
                self.events += response.events
        except grpc.aio.AioRpcError as error:
            self.status = read_status(error)


def is_end(event: pb.SessionEvent) -> bool:
    """Whether it is the last one of its request."""
    return event.HasField("error") or event.delta.HasField("summary")


def submits(*given: pb.SessionSubmit) -> Iterator[pb.SessionRequest]:
    """What a session's client says that half-closes behind them."""
    return iter([pb.SessionRequest(submit=submit) for submit in given])


async def status_of(call: Awaitable[Any]) -> Status:
    """Of a call that must fail."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return read_status(error)
    raise AssertionError("the call did not fail")


async def hear(call: Any) -> Heard:
    """A stream of answers to its end, good or bad."""
    messages: list[Any] = []
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            messages.append(message)
    except grpc.aio.AioRpcError as error:
        return Heard(messages, read_status(error))
    return Heard(messages)


def read_status(error: grpc.aio.AioRpcError) -> Status:
    fields: list[str] = []
    retry_after_s = None
    rich = rpc_status.from_call(error)
    for detail in rich.details if rich is not None else ():
        bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(bad):
            fields += [violation.field for violation in bad.field_violations]
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return Status(error.code(), error.details() or "", tuple(fields), retry_after_s)
