"""The shim's line to an engine: every request over one Session, and the rpcs beside it.

Knows gRPC and ids; which HTTP request an answer belongs to is its caller's. Everything here runs on
one asyncio loop.
"""

import asyncio
import itertools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ...engine.errors import EngineUnavailable, RequestError, SlowReader
from ...protos.quire.v1 import inference_pb2 as pb
from ...protos.quire.v1 import inference_pb2_grpc

logger = logging.getLogger(__name__)

AnyRequest = pb.GenerateRequest | pb.ChatRequest
Outcome = pb.GenerateDelta | pb.SessionError

# Answers are as long as they were asked for. An engine that comes back is found at once.
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 30_000),
)
_SERVICE = "quire.v1.Inference"
_RECONNECT_S = 0.1
# Of one call's events that were not taken, about; what comes after that ends the call.
MAX_WAITING_BYTES = 256 << 10
_EVENT_BYTES, _LOGPROB_BYTES = 32, 24
# The engine takes no larger message, and ends the stream of one who sends it.
_MAX_MESSAGE_BYTES = (32 << 20) - 1024
_CALL_TIMEOUT_S = 30.0
_UNAVAILABLE: int = grpc.StatusCode.UNAVAILABLE.value[0]


@dataclass(frozen=True)
class EngineAddress:
    """target: host:port or unix:path. key: of this shim. ca: PEM of the authorities, for TLS."""

    target: str
    key: str | None = None
    ca: Path | None = None


class Answers:
    """The requests of one caller, and one reader of all their events. Close it in any case."""

    def __init__(self, engine: "Engine", bearer_key: str | None, num_logprobs: int | None) -> None:
        self._engine = engine
        # Of one token, about; to look at each would be work. None: each is looked at.
        self._event_bytes = (
            None if num_logprobs is None else _EVENT_BYTES + _LOGPROB_BYTES * num_logprobs
        )
        self._key = bearer_key
        self._ids: list[int] = []
        self._events: list[tuple[int, Outcome]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._num_ended = 0
        self._num_bytes = 0  # of the events, about
        self.is_overrun = False  # nobody took the events, so the requests were ended

    @property
    def num_open(self) -> int:
        """Requests whose last event has not been put in."""
        return len(self._ids) - self._num_ended

    @property
    def has_events(self) -> bool:
        """take() would not wait."""
        return bool(self._events)

    def submit(self, request: AnyRequest) -> None:
        """Start one more request. Raises EngineUnavailable."""
        self._ids.append(self._engine._submit(request, self._key, self, len(self._ids)))

    async def take(self) -> list[tuple[int, Outcome]]:
        """What has come since the last call, at least one event, each with the number of its
        request in the order of submit(). Raises SlowReader.
        """
        if self.is_overrun:
            raise SlowReader("more of the answer waited to be read than is kept; read faster")
        if not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        taken, self._events, self._num_bytes = self._events, [], 0
        return taken

    def close(self) -> None:
        """End what has not ended."""
        self._engine._cancel(self._ids)

    def _put(self, number: int, outcome: Outcome, *, is_last: bool) -> None:
        self._num_ended += is_last
        if self._num_bytes > MAX_WAITING_BYTES:
            self.is_overrun = True
            self.close()
            return
        num_bytes = self._event_bytes
        self._num_bytes += outcome.ByteSize() if num_bytes is None else num_bytes
        self._events.append((number, outcome))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Engine:
    """Make it where an asyncio loop runs; run() is to be a task for as long as it is used."""

    def __init__(self, address: EngineAddress) -> None:
        options = _CHANNEL_OPTIONS
        if address.ca is None:
            self._channel = grpc.aio.insecure_channel(address.target, options=options)
        else:
            credentials = grpc.ssl_channel_credentials(address.ca.read_bytes())
            self._channel = grpc.aio.secure_channel(address.target, credentials, options=options)
        self.stub: Any = inference_pb2_grpc.InferenceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)
        self._key = address.key
        self._ids = itertools.count(1)
        self._answers: dict[int, tuple[Answers, int]] = {}
        self._outgoing: asyncio.Queue[pb.SessionRequest] = asyncio.Queue()
        self._last_loss = ""
        self.is_connected = False  # whether requests can be submitted
        self.is_leaving = False  # the engine too may be on its way out

    @property
    def num_open(self) -> int:
        """Requests without their last event."""
        return len(self._answers)

    async def run(self) -> None:
        """Keep a Session open across restarts of the engine, until cancelled."""
        while True:
            try:
                await self._follow()
                why = "the engine ended the stream of requests"
            except grpc.aio.AioRpcError as error:
                why = f"{error.code().name}: {error.details()}"
            self._lose(why)
            await asyncio.sleep(_RECONNECT_S)

    def open(self, bearer_key: str | None, num_logprobs: int | None = 0) -> Answers:
        """For requests in the name of whoever has the key. num_logprobs: of each token, those that
        were asked for; None for as many as the vocabulary has.
        """
        return Answers(self, bearer_key, num_logprobs)

    async def call(self, rpc: Any, request: Any, bearer_key: str | None) -> Any:
        """The answer of a unary rpc of `stub`, in the name of whoever has the key.

        Raises grpc.aio.AioRpcError.
        """
        metadata = _metadata(bearer_key)
        return await rpc(request, metadata=metadata, timeout=_CALL_TIMEOUT_S)

    async def is_serving(self, timeout_s: float) -> bool:
        """What the engine's health says, and whether there is a stream to it."""
        if not self.is_connected:
            return False
        request = health_pb2.HealthCheckRequest(service=_SERVICE)
        try:
            answer = await self._health.Check(request, timeout=timeout_s)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        await self._channel.close()

    # Inside

    def _submit(
        self, request: AnyRequest, bearer_key: str | None, answers: Answers, number: int
    ) -> int:
        if not self.is_connected:
            raise EngineUnavailable(
                "the engine is not there; try again in a second", retry_after_s=1.0
            )
        session_id = next(self._ids)
        submit = pb.SessionSubmit(id=session_id, bearer_key=bearer_key or "")
        if isinstance(request, pb.ChatRequest):
            submit.chat.CopyFrom(request)
        else:
            submit.generate.CopyFrom(request)
        message = pb.SessionRequest(submit=submit)
        if message.ByteSize() > _MAX_MESSAGE_BYTES:
            raise RequestError(
                f"the request has {message.ByteSize()} bytes, at most {_MAX_MESSAGE_BYTES} are "
                "allowed; send less"
            )
        self._answers[session_id] = answers, number
        self._outgoing.put_nowait(message)
        return session_id

    async def _follow(self) -> None:
        """One Session, from its start to its end."""
        outgoing: asyncio.Queue[pb.SessionRequest] = asyncio.Queue()
        self._outgoing = outgoing
        call = self.stub.Session(metadata=_metadata(self._key))
        await call.initial_metadata()  # sent once the engine has taken the call
        self.is_connected = not call.done()  # it comes of a call that failed, too
        writing = asyncio.create_task(_write(call, outgoing))
        try:
            async for message in call:
                for event in message.events:
                    self._on_event(event)
        finally:
            self.is_connected = False
            writing.cancel()
            call.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    def _on_event(self, event: pb.SessionEvent) -> None:
        session_id = event.id
        found = self._answers.get(session_id)
        if found is None:
            return  # of a request that was closed
        answers, number = found
        delta = event.delta
        if event.HasField("error"):
            del self._answers[session_id]
            answers._put(number, event.error, is_last=True)
        elif delta.finish_reason and delta.HasField("summary"):
            del self._answers[session_id]
            answers._put(number, delta, is_last=True)
        else:
            answers._put(number, delta, is_last=False)

    def _lose(self, why: str) -> None:
        if why != self._last_loss and not self.is_leaving:  # not again and again while it is away
            logger.warning("there is no stream to the engine: %s", why)
        self._last_loss = why
        for session_id in list(self._answers):
            error = pb.SessionError(
                code=_UNAVAILABLE,
                message="the engine was lost while this request was under way; send it again",
                retry_after_ns=10**9,
            )
            self._on_event(pb.SessionEvent(id=session_id, error=error))

    def _cancel(self, session_ids: Iterable[int]) -> None:
        for session_id in session_ids:
            if self._answers.pop(session_id, None) is not None:
                cancel = pb.SessionCancel(id=session_id)
                self._outgoing.put_nowait(pb.SessionRequest(cancel=cancel))


async def _write(call: Any, outgoing: asyncio.Queue[pb.SessionRequest]) -> None:
    while True:  # until cancelled, with the call
        await call.write(await outgoing.get())


def _metadata(key: str | None) -> tuple[tuple[str, str], ...]:
    return () if key is None else (("authorization", f"Bearer {key}"),)
