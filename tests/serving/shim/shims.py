"""A shim in this process, in front of a gateway in this process."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
import uvloop
from quire.serving.http_config import HttpConfig
from quire.serving.shim.app import make_app
from quire.serving.shim.engine import Engine, EngineAddress
from quire.serving.shim.process import ShimOptions, bound_socket
from quire.serving.shim.protocol import IDLE_TIMEOUT_S, BoundedProtocol

from ..core.cores import WAIT_S
from ..gateway.gateways import Core, Served, open_gateway, until

MODEL = "quire-demo"
KEY = "sk-1"  # of those engines that want one
SUM = [{"role": "user", "content": "What is 23 + 58?"}]


@dataclass
class Front:
    """A shim that serves, a client of it, and the gateway behind it."""

    url: str
    http: httpx.AsyncClient
    engine: Engine
    served: Served

    async def chat(self, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": SUM, "temperature": 0} | fields
        return await self.http.post("/v1/chat/completions", json=body)

    async def complete(self, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "prompt": "Once upon a time", "temperature": 0} | fields
        return await self.http.post("/v1/completions", json=body)


@asynccontextmanager
async def open_front(
    core: Core,
    *,
    key: str | None = None,
    http: HttpConfig | None = None,
    is_local: bool = False,
    **options: Any,
) -> AsyncIterator[Front]:
    """options: of open_gateway(). key: of the shim's own stream."""
    async with open_gateway(core, **options) as served:
        engine = Engine(EngineAddress(served.address, key))
        http = http or HttpConfig(port=0)
        app = make_app(
            engine, http, has_key=key is not None, local_host="127.0.0.1" if is_local else None
        )
        listening = bound_socket(ShimOptions("127.0.0.1", http, EngineAddress("")))
        config = uvicorn.Config(
            app,
            loop="none",
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            timeout_graceful_shutdown=1,
            # The loop stands still between tests: a connection must outlive that.
            timeout_keep_alive=round(IDLE_TIMEOUT_S),
        )
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
        server = uvicorn.Server(config)
        tasks = [
            asyncio.create_task(engine.run()),
            asyncio.create_task(server.serve(sockets=[listening])),
        ]
        try:
            await until(lambda: server.started and engine.is_connected)
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            async with httpx.AsyncClient(base_url=url, timeout=WAIT_S, trust_env=False) as client:
                yield Front(url, client, engine, served)
        finally:
            server.should_exit = True
            await tasks[1]
            tasks[0].cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await tasks[0]
            await engine.close()


@contextmanager
def front_stage(core: Core, **options: Any) -> Iterator[Callable[..., Any]]:
    """A loop with a shim in it. What is given runs a test's coroutine, again and again; after it
    nothing may be left open.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        stack = AsyncExitStack()
        front = runner.run(stack.enter_async_context(open_front(core, **options)))

        async def used(use: Callable[[Front], Any]) -> Any:
            async with asyncio.timeout(WAIT_S):
                result = await use(front)
                await front.served.until_idle()
            return result

        try:
            yield lambda use: runner.run(used(use))
        finally:
            runner.run(stack.aclose())
