"""OpenAI's own client when the server cannot answer now: it tries again, as it does by itself, and
gets its answer; told not to, it raises what callers expect.

What refuses ends once the first refusal is there, so each client needs one retry, however slow the
machine is.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from quire.engine.startup import Engine
from quire.serving.gateway.gateway import Gateway, GatewayOptions

from ..core.cores import OPTIONS
from ..gateway.gateways import SECRET, Served, real_core, until
from .shims import MODEL, SUM, Front, front_stage

DEMO = {"model": None}
RIGHT = "23 + 58 = 81."


@asynccontextmanager
async def client_of(
    front: Front, on_refused: Callable[[], Awaitable[None]], statuses: list[int], **options: Any
) -> AsyncIterator[openai.AsyncOpenAI]:
    """on_refused: what happens after the first refusal, before the client looks at it.
    statuses: of the answers, retries included.
    """

    async def note(response: Any) -> None:
        statuses.append(response.status_code)
        if len(statuses) == 1:
            await on_refused()

    http = openai.DefaultAsyncHttpxClient(event_hooks={"response": [note]})
    async with openai.AsyncOpenAI(
        base_url=f"{front.url}/v1", api_key="x", http_client=http, **options
    ) as client:
        yield client


async def ask(client: openai.AsyncOpenAI, *, is_streamed: bool) -> str:
    asked: Any = {"model": MODEL, "messages": SUM, "temperature": 0}
    if not is_streamed:
        answer = await client.chat.completions.create(**asked)
        return str(answer.choices[0].message.content)
    stream = await client.chat.completions.create(**asked, stream=True)
    return "".join([c.choices[0].delta.content or "" async for c in stream])


async def asked_with_defaults(
    front: Front, on_refused: Callable[[], Awaitable[None]], status: int, *, is_streamed: bool
) -> None:
    """The client's own retries bring the answer."""
    statuses: list[int] = []
    async with client_of(front, on_refused, statuses) as client:
        assert await ask(client, is_streamed=is_streamed) == RIGHT
    assert statuses == [status, 200]


async def refusal(front: Front, *, is_streamed: bool) -> openai.APIStatusError:
    """Of a client that is told not to try again."""

    async def nothing() -> None:
        pass

    statuses: list[int] = []
    async with client_of(front, nothing, statuses, max_retries=0) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await ask(client, is_streamed=is_streamed)
    assert statuses == [caught.value.status_code]
    assert caught.value.request_id
    return caught.value


@asynccontextmanager
async def gateway_in_place_of(served: Served) -> AsyncIterator[None]:
    """Another one at the address of one that has ended, in front of the same core."""
    port = int(served.address.rpartition(":")[2])
    gateway = Gateway(GatewayOptions(OPTIONS | DEMO, {"grpc_port": port}, served.socket, SECRET))
    try:
        await gateway.start()
        await gateway.health.has_served.wait()
        yield
    finally:
        await gateway.close()


@pytest.mark.parametrize("is_streamed", [False, True])
def test_full_queue_is_a_rate_limit_and_a_retry_is_answered(
    demo: Engine, is_streamed: bool
) -> None:
    async def use(front: Front) -> None:
        waiting = front.served.gateway.intake._waiting
        # That some have started lately says that there is room soon.
        waiting.enter(50, 1).leave(has_started=True)
        place = waiting.enter(1, 1)
        error = await refusal(front, is_streamed=is_streamed)
        assert isinstance(error, openai.RateLimitError)
        assert error.code == "rate_limit_exceeded"
        assert error.type == "rate_limit_error"
        assert "max_num_queued_reqs" in error.message
        assert error.response.headers["retry-after"] == "1"
        assert 100 <= int(error.response.headers["retry-after-ms"]) <= 1000

        async def leave() -> None:
            place.leave()

        await asked_with_defaults(front, leave, 429, is_streamed=is_streamed)

    with front_stage(real_core(demo), engine=DEMO, max_num_queued_reqs=1) as run:
        run(use)


def test_crowd_before_a_small_queue_is_answered(demo: Engine) -> None:
    """Most are refused at first, and each gets its own answer in the end."""

    async def use(front: Front) -> None:
        # So that there is a rate by which the time to wait is told.
        warm = await front.complete(n=16, temperature=1, max_tokens=1)
        assert warm.status_code == 200
        async with openai.AsyncOpenAI(
            base_url=f"{front.url}/v1", api_key="x", max_retries=100
        ) as client:

            async def sum_of(number: int) -> str | None:
                content = f"What is {number} + 58?"
                answer = await client.chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": content}], temperature=0
                )
                return answer.choices[0].message.content

            answers = await asyncio.gather(*(sum_of(number) for number in range(20, 40)))
        assert answers == [f"{number} + 58 = {number + 58}." for number in range(20, 40)]
        assert front.served.gateway.metrics.rejected_by_reason["max_num_queued_reqs"] > 0

    with front_stage(real_core(demo), engine=DEMO, max_num_queued_reqs=1) as run:
        run(use)


def must_be_unavailable(error: openai.APIStatusError, part: str) -> None:
    assert isinstance(error, openai.InternalServerError)
    assert error.status_code == 503
    assert error.code == "service_unavailable"
    assert part in error.message
    assert error.response.headers["retry-after"] == "1"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_starting_engine_is_unavailable_and_a_retry_is_answered(
    demo: Engine, is_streamed: bool
) -> None:
    """The gateway is there and its core is not yet."""

    @asynccontextmanager
    async def late_core(socket: Path) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        async with AsyncExitStack() as stack:

            async def start() -> None:
                await stack.enter_async_context(real_core(demo)(socket))

            yield start

    async def use(front: Front) -> None:
        must_be_unavailable(await refusal(front, is_streamed=is_streamed), "is starting")

        async def start() -> None:
            await front.served.core()
            await front.served.gateway.health.has_served.wait()

        await asked_with_defaults(front, start, 503, is_streamed=is_streamed)

    with front_stage(late_core, engine=DEMO, has_served=False) as run:
        run(use)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_lost_gateway_is_unavailable_and_a_retry_is_answered(
    demo: Engine, is_streamed: bool
) -> None:
    async def use(front: Front) -> None:
        await front.served.gateway.close()
        await until(lambda: not front.engine.is_connected)
        must_be_unavailable(await refusal(front, is_streamed=is_streamed), "is not there")
        async with AsyncExitStack() as stack:

            async def start() -> None:
                await stack.enter_async_context(gateway_in_place_of(front.served))
                await until(lambda: front.engine.is_connected)

            await asked_with_defaults(front, start, 503, is_streamed=is_streamed)

    with front_stage(real_core(demo), engine=DEMO) as run:
        run(use)


def test_request_under_way_on_a_lost_gateway_is_sent_again(demo: Engine) -> None:
    async def use(front: Front) -> None:
        gateway, statuses = front.served.gateway, list[int]()
        async with AsyncExitStack() as stack:

            async def start() -> None:
                await stack.enter_async_context(gateway_in_place_of(front.served))
                await until(lambda: front.engine.is_connected)

            async with client_of(front, start, statuses) as client:
                asked: Any = {"model": MODEL, "prompt": "a", "max_tokens": 500}
                asked["extra_body"] = {"ignore_eos": True}
                asking = asyncio.create_task(client.completions.create(**asked))
                await until(lambda: gateway.metrics.num_generation_tokens)
                await gateway.close()
                answer = await asking
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 500
        assert statuses == [503, 200]

    with front_stage(real_core(demo), engine=DEMO) as run:
        run(use)


def test_server_that_stops_says_when_to_try_again(demo: Engine) -> None:
    """It said 503 and no Retry-After. By then another may be in its place."""

    async def use(front: Front) -> None:
        front.served.gateway.intake.is_draining = True
        must_be_unavailable(await refusal(front, is_streamed=False), "is shutting down")

    with front_stage(real_core(demo), engine=DEMO) as run:
        run(use)


def test_server_that_is_not_there_is_a_connection_error() -> None:
    async def use() -> None:
        async with openai.AsyncOpenAI(
            base_url="http://127.0.0.1:9/v1", api_key="x", max_retries=0
        ) as client:
            with pytest.raises(openai.APIConnectionError):
                await client.models.list()

    asyncio.run(use())
