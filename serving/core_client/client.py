"""A client of the core's socket: one stream of requests, and the core's status.

Knows the wire and when the core is lost; which requests to send again is the caller's. Everything
here runs on one asyncio loop.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from ...engine.core_io import StepOutput, Submission
from ...engine.errors import EngineStopped
from ...protos.quire.core.v1 import core_pb2, core_pb2_grpc
from .wire import outputs_from_proto, submission_to_proto

# Between processes of one engine nothing bounds a message but protobuf's 2 GiB. A core that comes
# back is found at once; gRPC would let it wait for up to two minutes.
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)


@dataclass(frozen=True)
class CoreStatus:
    """GetStatus as a record; the meanings are core.proto's."""

    has_work: bool
    step_age_ns: int
    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    counters: dict[str, float]
    num_compiles: int
    max_model_len: int
    vocab_size: int


class CoreClient:
    """The connection to the core behind one socket, across its restarts."""

    def __init__(self, socket: Path) -> None:
        """Make it where an asyncio loop runs. Connects when first used."""
        self._channel = grpc.aio.insecure_channel(f"unix:{socket}", options=CHANNEL_OPTIONS)
        self._stub: Any = core_pb2_grpc.CoreStub(self._channel)

    async def status(self, timeout_s: float, *, is_starting: bool = False) -> CoreStatus:
        """What the core says of itself. is_starting: wait for one that does not listen yet.

        Raises EngineStopped when there is no answer in time.
        """
        try:
            message = await self._stub.GetStatus(
                core_pb2.GetStatusRequest(), timeout=timeout_s, wait_for_ready=is_starting
            )
        except grpc.aio.AioRpcError as error:
            raise EngineStopped(f"the core gave no status: {_said(error)}") from error
        return CoreStatus(
            message.has_work,
            message.step_age_ns,
            message.num_running,
            message.num_waiting,
            message.num_pages,
            message.num_free_pages,
            dict(message.counters),
            message.num_compiles,
            message.max_model_len,
            message.vocab_size,
        )

    def open_stream(self) -> "CoreStream":
        """A new stream, which takes the place of an earlier one, of whatever process.

        The core need not be there yet: the stream waits until it listens.
        """
        return CoreStream(self._stub)

    async def close(self) -> None:
        """End the connection; the core aborts what its stream left open."""
        await self._channel.close()


class CoreStream:
    """Requests to the core and their outputs, until either side ends it.

    Iterating gives the outputs of one step at a time, or of several when the caller was slow, and
    raises EngineStopped when the core is lost. Outputs of a request may still come after its
    abort(), so an id is never used twice in one stream.
    """

    def __init__(self, stub: Any) -> None:
        self._pending = core_pb2.Commands()
        self._has_pending = asyncio.Event()
        self._is_closed = False
        self._call = stub.Run(self._commands(), wait_for_ready=True)

    def submit(self, submissions: Iterable[Submission]) -> None:
        """Send requests; one that the core refuses ends with an output that says why.

        Raises RequestError, with nothing sent, when a request cannot be carried.
        """
        messages = [submission_to_proto(s) for s in submissions]
        self._pending.submits.extend(messages)
        self._has_pending.set()

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests before the next step. Unknown ids are ignored."""
        self._pending.aborts.extend(request_ids)
        self._has_pending.set()

    async def __aiter__(self) -> AsyncIterator[list[StepOutput]]:
        try:
            async for message in self._call:
                yield outputs_from_proto(message)
        except grpc.aio.AioRpcError as error:
            raise EngineStopped(f"the core was lost: {_said(error)}") from error
        if not self._is_closed:
            raise EngineStopped("the core ended the stream of requests")

    def close(self) -> None:
        """End the stream; the core aborts its requests. Whoever iterates comes to an end."""
        self._is_closed = True
        self._has_pending.set()

    async def _commands(self) -> AsyncIterator[core_pb2.Commands]:
        while not self._is_closed:
            await self._has_pending.wait()
            self._has_pending.clear()
            commands, self._pending = self._pending, core_pb2.Commands()
            yield commands


def _said(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details()}"
