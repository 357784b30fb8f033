"""quire.core.v1.Core over the step loop: one stream of requests at a time, and a status that
answers while the loop is stuck.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from ...engine.compiler import num_compile_events
from ...engine.loop import EngineLoop
from ...engine.startup import Engine
from ...engine.token_checks import TokenLimits
from ...protos.quire.core.v1 import core_pb2, core_pb2_grpc
from ..core_client.client import CHANNEL_OPTIONS
from .stream import Stream

# A message that the reader does not take in this time ends the stream.
WRITE_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class _Ending:
    """Why a stream is ended from this side."""

    code: grpc.StatusCode
    why: str


_REPLACED = _Ending(grpc.StatusCode.ABORTED, "a newer stream took the place of this one")
_NOT_READ = _Ending(
    grpc.StatusCode.RESOURCE_EXHAUSTED, "the outputs were not read; open a new stream"
)


class _Run:
    """One call of Run: its stream, and what its coroutine waits for."""

    def __init__(self, loop: EngineLoop, limits: TokenLimits) -> None:
        self._aio = asyncio.get_running_loop()
        self.has_output = asyncio.Event()
        self.ending: asyncio.Future[_Ending] = self._aio.create_future()
        self.stream = Stream(loop, limits, self._wake)

    def end(self, ending: _Ending) -> None:
        if not self.ending.done():
            self.ending.set_result(ending)

    def _wake(self) -> None:
        self._aio.call_soon_threadsafe(self._on_output)

    def _on_output(self) -> None:
        if self.stream.is_overrun:
            self.end(_NOT_READ)
        self.has_output.set()


class CoreServer(core_pb2_grpc.CoreServicer):
    """Owns the step loop of an engine. Make it where an asyncio loop runs."""

    def __init__(self, engine: Engine, max_logprobs: int) -> None:
        self._engine = engine
        self._limits = TokenLimits(engine.logits_width, engine.max_model_len, max_logprobs)
        self._aio = asyncio.get_running_loop()
        self._run: _Run | None = None
        self._num_compiles_before = num_compile_events()
        self.failed: asyncio.Future[BaseException] = self._aio.create_future()
        self._loop = EngineLoop(engine.core, self._after_step)

    def close(self) -> None:
        """Stop the step loop after the step under way."""
        self._loop.close()

    # Rpcs, in their names of the .proto

    async def Run(self, requests: AsyncIterator[core_pb2.Commands], context: Any) -> None:
        """Until either side ends it or a newer call comes; then its requests are aborted."""
        run = _Run(self._loop, self._limits)
        if self._run is not None:
            self._run.stream.end()  # before the newer one submits
            self._run.end(_REPLACED)
        self._run = run
        tasks = [
            asyncio.create_task(_read(requests, run)),
            asyncio.create_task(_write(context, run)),
        ]
        try:
            waited: list[asyncio.Future[Any]] = [*tasks, run.ending]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            run.stream.end()
            if self._run is run:
                self._run = None
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        if run.ending.done():
            await context.abort(run.ending.result().code, run.ending.result().why)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def GetStatus(
        self, request: core_pb2.GetStatusRequest, context: Any
    ) -> core_pb2.GetStatusResponse:
        """Each number is read while the loop may change the next one."""
        loop, core = self._loop.status(), self._engine.core
        return core_pb2.GetStatusResponse(
            has_work=loop.has_work,
            step_age_ns=loop.step_age_ns,
            num_running=len(core.scheduler.running),
            num_waiting=len(core.scheduler.waiting),
            num_pages=core.scheduler.pool.num_usable,
            num_free_pages=core.scheduler.pool.num_free,
            counters=core.counters(),
            num_compiles=num_compile_events() - self._num_compiles_before,
            max_model_len=self._limits.max_model_len,
            vocab_size=self._limits.logits_width,
        )

    # The loop's thread

    def _after_step(self) -> None:
        failure = self._loop.failure
        if failure is not None:
            # Nothing goes out of what the loop ended: the caller resumes it in another core.
            self._aio.call_soon_threadsafe(self._on_failure, failure)
        elif (run := self._run) is not None:
            run.stream.on_step()

    def _on_failure(self, failure: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_result(failure)


async def _read(requests: AsyncIterator[core_pb2.Commands], run: _Run) -> None:
    async for commands in requests:
        run.stream.take(commands)


async def _write(context: Any, run: _Run) -> None:
    while True:  # until cancelled, with the call
        await run.has_output.wait()
        run.has_output.clear()
        message = run.stream.message()
        if message is None:
            continue
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await context.write(message)
        except TimeoutError:
            run.end(_NOT_READ)
            return


async def listen(server: CoreServer, socket: Path) -> grpc.aio.Server:
    """Serve on a Unix socket that only this user can open."""
    listener = grpc.aio.server(options=CHANNEL_OPTIONS)
    core_pb2_grpc.add_CoreServicer_to_server(server, listener)
    listener.add_insecure_port(f"unix:{socket}")
    socket.chmod(0o600)
    await listener.start()
    return listener
