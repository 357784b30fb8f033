"""quire.v1.Inference: every rpc of the .proto, each in its name.

Here a call meets its caller, its sink and its status; what a request is, and how it runs, is the
intake's and the link's.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from ...engine.errors import EngineUnavailable, QuireError, RequestError, SlowReader
from ...protos.quire.v1 import inference_pb2, inference_pb2_grpc
from . import outbox as outboxes
from .about import About
from .callers import Caller, Callers
from .gathered import Gathered
from .intake import Intake
from .metrics import GatewayMetrics
from .open_request import OpenRequest
from .outbox import Lane, Outbox
from .prepare import AnyRequest, detokenize, text_size, tokenize
from .session import Session, write_all
from .statuses import abort, internal_error

MAX_ABORTS = 1024

Fail = Callable[[OpenRequest, QuireError], None]


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """The public service. Make it where an asyncio loop runs."""

    def __init__(
        self, intake: Intake, callers: Callers, fail: Fail, about: About, metrics: GatewayMetrics
    ) -> None:
        """fail: ends a request with an error, through its sink."""
        self._intake = intake
        self._callers = callers
        self._fail = fail
        self._about = about
        self._metrics = metrics
        self._sessions: set[Session] = set()
        self._outboxes: set[Outbox] = set()  # of the other streams

    # Answers

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> inference_pb2.GenerateResponse:
        return await self._answer(request, context)

    async def Chat(
        self, request: inference_pb2.ChatRequest, context: Any
    ) -> inference_pb2.GenerateResponse:
        return await self._answer(request, context)

    async def GenerateStream(self, request: inference_pb2.GenerateRequest, context: Any) -> None:
        await self._stream(request, context)

    async def ChatStream(self, request: inference_pb2.ChatRequest, context: Any) -> None:
        await self._stream(request, context)

    async def Session(
        self, requests: AsyncIterator[inference_pb2.SessionRequest], context: Any
    ) -> None:
        session = Session(self._intake, self._callers, self._caller(context), self._fail)
        await context.send_initial_metadata(())  # so that the client knows that it is taken
        self._sessions.add(session)
        reading = asyncio.create_task(session.read(requests))
        is_read = True
        try:
            await write_all(session, context, outboxes.WRITE_TIMEOUT_S)
        except TimeoutError:
            is_read = False
        finally:
            self._sessions.discard(session)
            reading.cancel()
            session.close()
            # What ended the reading is of no more interest: the call is over.
            await asyncio.gather(reading, return_exceptions=True)
        if not is_read:
            await self._give_up(context)
        if session.was_ended:
            await abort(context, EngineUnavailable("the server is shutting down; use another one"))

    async def Abort(
        self, request: inference_pb2.AbortRequest, context: Any
    ) -> inference_pb2.AbortResponse:
        if len(request.request_ids) > MAX_ABORTS:
            error = RequestError(
                f"request_ids has {len(request.request_ids)} entries, at most {MAX_ABORTS} are "
                "allowed; send them in several calls",
                field="request_ids",
            )
            await abort(context, error)
        self._intake.abort(self._caller(context), request.request_ids)
        return inference_pb2.AbortResponse()

    # Text

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Any
    ) -> inference_pb2.TokenizeResponse:
        async def made() -> inference_pb2.TokenizeResponse:
            served = self._intake.require_served()
            size = len(request.text) + text_size(request.chat)
            token_ids = await self._intake.on_thread(size, tokenize, request, served)
            return inference_pb2.TokenizeResponse(
                token_ids=token_ids, max_model_len=served.limits.max_model_len
            )

        return await _or_abort(made(), context)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Any
    ) -> inference_pb2.DetokenizeResponse:
        async def made() -> inference_pb2.DetokenizeResponse:
            served = self._intake.require_served()
            size = len(request.token_ids)
            text = await self._intake.on_thread(size, detokenize, request, served)
            return inference_pb2.DetokenizeResponse(text=text)

        return await _or_abort(made(), context)

    # Facts

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        async def made() -> inference_pb2.ListModelsResponse:
            return self._about.models(self._intake.require_served())

        return await _or_abort(made(), context)

    async def GetServerInfo(
        self, request: inference_pb2.GetServerInfoRequest, context: Any
    ) -> inference_pb2.GetServerInfoResponse:
        async def made() -> inference_pb2.GetServerInfoResponse:
            restarts = self._metrics.core_restarts
            return self._about.server(self._intake.require_served(), restarts)

        return await _or_abort(made(), context)

    async def GetMetrics(
        self, request: inference_pb2.GetMetricsRequest, context: Any
    ) -> inference_pb2.GetMetricsResponse:
        return inference_pb2.GetMetricsResponse(text=self._metrics.render())

    # Life

    @property
    def has_unread(self) -> bool:
        """Whether a client has not taken all that was made for it."""
        of_sessions = (session.outbox for session in self._sessions)
        return not all(outbox.is_heard for outbox in (*self._outboxes, *of_sessions))

    def close(self) -> None:
        """End what the sessions have open, and then the sessions."""
        for session in self._sessions:
            session.end()

    # Inside

    def _caller(self, context: Any) -> Caller:
        # The interceptor has let the call in, so the key is one of ours.
        return self._callers.of_metadata(context.invocation_metadata())

    async def _answer(self, message: AnyRequest, context: Any) -> inference_pb2.GenerateResponse:
        sink = Gathered()
        request = await _or_abort(self._intake.open(message, self._caller(context), sink), context)
        try:
            return await _or_abort(sink.response(request), context)
        finally:
            self._intake.cancel(request)

    async def _stream(self, message: AnyRequest, context: Any) -> None:
        outbox = Outbox()
        lane = Lane(outbox, 0, self._fail)
        request = await _or_abort(self._intake.open(message, self._caller(context), lane), context)
        self._outboxes.add(outbox)
        try:
            while not (request.is_done and outbox.is_empty):
                response = await outbox.take()
                for event in response.events:
                    if event.HasField("error"):
                        assert lane.error is not None
                        await abort(context, lane.error)
                    async with asyncio.timeout(outboxes.WRITE_TIMEOUT_S):
                        await context.write(event.delta)
        except TimeoutError:
            self._intake.cancel(request)
            self._outboxes.discard(outbox)
            await self._give_up(context)
        finally:
            self._outboxes.discard(outbox)
            self._intake.cancel(request)

    async def _give_up(self, context: Any) -> None:
        """Once nothing is open any more: the status waits behind the message that is not read."""
        self._metrics.num_cancelled_slow += 1
        why = f"a message was not read for {outboxes.WRITE_TIMEOUT_S:g} s; read faster"
        await abort(context, SlowReader(why))


async def _or_abort[R](made: Awaitable[R], context: Any) -> R:
    """What is made, or the status that says why not."""
    try:
        return await made
    except QuireError as error:
        await abort(context, error)
    except Exception as error:
        # The border of a call. gRPC itself would tell the caller what was raised.
        await abort(context, internal_error(error))
