"""`quire engine` or `quire serve` as a process for tests: what is behind it, and a client of it."""

import asyncio
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from quire.protos.quire.v1 import inference_pb2 as pb
from quire.protos.quire.v1 import inference_pb2_grpc
from quire.serving.core_client.client import CoreClient, CoreStatus

from ..core.cores import is_idle
from ..supervisor.supervised import is_alive, wait_until

WAIT_S = 60.0
_POLL_S = 0.01
_EOS = 2  # of the embedded model
_MAIN = "import sys; from quire.serving.cli import main; sys.exit(main())"
_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    # Channels to one address would share a connection, and what happens to it.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 100),
)

Use = Callable[["Client"], Awaitable[Any]]


def generate(text: str = "Once upon a time", **params: Any) -> pb.GenerateRequest:
    """A request of a known length whose answer does not repeat itself: hot, and without an end."""
    given = {"temperature": 1.6, "seed": 7, "max_tokens": 48, "logit_bias": {_EOS: -100}} | params
    return pb.GenerateRequest(text=text, sampling_params=pb.SamplingParams(**given))


@dataclass
class Answer:
    """One choice, whole."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[Any, ...]] = field(default_factory=list)
    finish_reason: int = pb.FINISH_REASON_UNSPECIFIED
    stop_reason: str = ""

    def add(self, part: pb.GenerateDelta | pb.Completion) -> None:
        self.text += part.text
        self.token_ids += part.token_ids
        for position in part.logprobs:
            self.logprobs.append(
                tuple((t.token_id, t.logprob, t.rank, t.text) for t in position.tokens)
            )
        self.finish_reason = part.finish_reason
        self.stop_reason = part.stop_reason.text


@dataclass
class Result:
    """What came of one request; equal to another with the same answers."""

    answers: dict[int, Answer] = field(default_factory=dict)
    summary: pb.Summary | None = field(default=None, compare=False)

    @property
    def num_tokens(self) -> int:
        return sum(len(answer.token_ids) for answer in self.answers.values())

    @property
    def was_resumed(self) -> bool:
        return self.summary is not None and self.summary.resumed

    def add(self, part: pb.GenerateDelta | pb.Completion) -> None:
        self.answers.setdefault(part.index, Answer()).add(part)
        if isinstance(part, pb.GenerateDelta) and part.HasField("summary"):
            self.summary = part.summary


class Client:
    """A connection to an engine of its own. Make it where an asyncio loop runs."""

    def __init__(
        self,
        address: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        key: str | None = None,
        options: tuple[tuple[str, int], ...] = (),
    ) -> None:
        options = (*_CHANNEL_OPTIONS, *options)
        if credentials is None:
            self.channel = grpc.aio.insecure_channel(address, options=options)
        else:
            self.channel = grpc.aio.secure_channel(address, credentials, options=options)
        self.stub: Any = inference_pb2_grpc.InferenceStub(self.channel)
        self.metadata = None if key is None else (("authorization", f"Bearer {key}"),)
        self._health: Any = health_pb2_grpc.HealthStub(self.channel)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    # Requests

    async def stream(self, request: pb.GenerateRequest, result: Result | None = None) -> Result:
        """result: to be filled, for whoever wants to see how far it is."""
        result = Result() if result is None else result
        async for delta in self.stub.GenerateStream(request, metadata=self.metadata):
            result.add(delta)
        return result

    async def ask(self, request: pb.GenerateRequest) -> Result:
        """The whole answer at once."""
        response = await self.stub.Generate(request, metadata=self.metadata)
        result = Result(summary=response.summary)
        for completion in response.outputs:
            result.add(completion)
        return result

    async def session(
        self, requests: Sequence[pb.GenerateRequest], results: Sequence[Result] | None = None
    ) -> Sequence[Result]:
        """All of them over one Session call. results: to be filled, one for each request."""
        results = [Result() for _ in requests] if results is None else results

        async def messages() -> Any:
            for number, request in enumerate(requests, 1):
                submit = pb.SessionSubmit(id=number, generate=request)
                yield pb.SessionRequest(submit=submit)

        async for response in self.stub.Session(messages(), metadata=self.metadata):
            for event in response.events:
                assert event.WhichOneof("event") == "delta", event.error
                results[event.id - 1].add(event.delta)
        return results

    # How the server is

    async def health(self) -> str:
        """The name of what it says."""
        response = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)

    async def is_serving(self) -> bool:
        """False also without an answer."""
        try:
            return await self.health() == "SERVING"
        except grpc.aio.AioRpcError:
            return False

    async def until_serving(self, *, is_so: bool = True, timeout_s: float = WAIT_S) -> None:
        async def as_wanted() -> bool:
            return await self.is_serving() is is_so

        await until(as_wanted, timeout_s)

    async def metrics(self) -> dict[str, float]:
        """Values by name, and by name/label where there is one beside the model."""
        call = self.stub.GetMetrics(pb.GetMetricsRequest(), metadata=self.metadata)
        values = {}
        for family in text_string_to_metric_families((await call).text):
            for sample in family.samples:
                labels = [v for k, v in sample.labels.items() if k != "model_name"]
                values["/".join([sample.name, *labels])] = sample.value
        return values

    async def until_metrics(
        self, is_so: Callable[[dict[str, float]], object], timeout_s: float = WAIT_S
    ) -> None:
        async def as_wanted() -> bool:
            return bool(is_so(await self.metrics()))

        await until(as_wanted, timeout_s)


class Proxy:
    """Carries bytes between clients and a server, until reset()."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._upstream: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> "Proxy":
        self._server = await asyncio.start_server(self._on_client, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.reset()
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    @property
    def address(self) -> str:
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    def reset(self) -> None:
        """The server gets a TCP reset in the place of whatever is under way."""
        for writer in self._upstream:
            if not writer.is_closing():
                # Closed with something to linger for and no time, the kernel sends a reset.
                linger = struct.pack("ii", 1, 0)
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()

    async def _on_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(self._host, int(self._port))
        self._upstream.append(to_server)
        await asyncio.gather(
            _pump(reader, to_server), _pump(from_server, writer), return_exceptions=True
        )
        writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while some := await reader.read(1 << 16):
            writer.write(some)
    finally:
        writer.close()


class Engine:
    """`quire engine`, from its start to its end; leaving the `with` kills what is left of it."""

    def __init__(
        self,
        *flags: str,
        verb: str = "engine",
        port: int = 0,
        connect: Callable[[str], Client] = Client,
    ) -> None:
        """verb: of the command. port: of gRPC. connect: makes a client that the engine takes."""
        self._folder = Path(tempfile.mkdtemp(prefix="quire"))  # pytest's are too long for sockets
        self._said = self._folder / "said"
        self._connect = connect
        self._expected: Result | None = None
        self.runtime = self._folder / "run"
        self.runtime.mkdir()
        kept = {k: v for k, v in os.environ.items() if not re.match("(QUIRE|VLLM)_", k)}
        kept["QUIRE_CACHE_DIR"] = os.environ["QUIRE_CACHE_DIR"]
        with self._said.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, verb, "--grpc-port", str(port), *flags],
                stderr=stderr,
                env=kept | {"XDG_RUNTIME_DIR": str(self.runtime)},
            )

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: object, __: TracebackType | None
    ) -> None:
        children = self.children() if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        if kind is not None:
            print(self.said, file=sys.stderr)
        shutil.rmtree(self._folder)
        wait_until(lambda: not any(map(is_alive, children)), timeout_s=5)

    @property
    def said(self) -> str:
        """Its stderr, and that of its processes."""
        return self._said.read_text()

    def until_said(self, part: str) -> None:
        wait_until(lambda: part in self.said or self.process.poll() is not None)
        assert part in self.said, self.said

    @property
    def address(self) -> str:
        """Where it serves, once it does."""
        self.until_said("quire: ready in ")
        return re.findall(r" (\S+) \(gRPC\)", self.said)[-1]

    @property
    def start_s(self) -> float:
        """What it says that its start took."""
        self.until_said("quire: ready in ")
        return float(re.findall(r"ready in (\S+) s", self.said)[0])

    def children(self) -> list[int]:
        """Ids of the processes that it has started and that are there."""
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in task.read_text().split()]

    def pid_of(self, name: str) -> int:
        """Of its core, its gateway or its only shim."""
        found = self.pids_of(name)
        assert len(found) == 1, self.said
        return found[0]

    def pids_of(self, name: str) -> list[int]:
        """Of those that there are of a kind."""
        part = f"quire.serving.{name}".encode()
        return [p for p in self.children() if part in Path(f"/proc/{p}/cmdline").read_bytes()]

    def client(self) -> Client:
        return self._connect(self.address)

    async def core_status(self) -> CoreStatus:
        """By the core itself: what the gateway knows is up to a second old."""
        (folder,) = self.runtime.iterdir()
        core = CoreClient(folder / "core.sock")
        try:
            return await core.status(5)
        finally:
            await core.close()

    async def until_core(self, is_so: Callable[[CoreStatus], bool]) -> None:
        async def as_wanted() -> bool:
            return is_so(await self.core_status())

        await until(as_wanted)

    def run(self, use: Use) -> None:
        """What a client does, and harm that is done meanwhile. The engine must stand it: serve
        with the same supervisor, hold nothing, and answer the same as before.
        """

        async def used() -> None:
            if self._expected is None:
                async with self.client() as client:
                    self._expected = await client.stream(generate())
            async with self.client() as client:
                await use(client)
            await self._require_unharmed()

        async def bounded() -> None:
            async with asyncio.timeout(3 * WAIT_S):
                await used()

        asyncio.run(bounded())

    async def _require_unharmed(self) -> None:
        assert self.process.poll() is None, self.said
        async with self.client() as client:
            await client.until_serving()
            assert await client.stream(generate()) == self._expected
            await client.until_metrics(lambda m: not m["quire_requests_open"])
            await self.until_core(is_idle)


async def until(is_so: Callable[[], Awaitable[bool]], timeout_s: float = WAIT_S) -> None:
    async with asyncio.timeout(timeout_s):
        while not await is_so():
            await asyncio.sleep(_POLL_S)


async def until_tokens(results: Iterable[Result], num_tokens: int) -> None:
    """Each has come so far."""
    results = list(results)
    deadline = time.monotonic() + WAIT_S
    while any(result.num_tokens < num_tokens for result in results):
        assert time.monotonic() < deadline, [result.num_tokens for result in results]
        await asyncio.sleep(_POLL_S / 10)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
