"""Thousands of HTTP calls of every kind, some broken off: each is answered right, nothing stays."""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ..gateway.footprints import require_no_growth, settled
from .servers import Heard, Raw, Server, Web, body, chat_body, request_bytes

NUM_WARM_UP, NUM_BEFORE, NUM_CALLS = 200, 500, 2_000
NUM_ACROSS = 64
BROKEN_OFF = 0.1
MOST_STORM_S = 180.0

RIGHT: dict[str, dict[str, Any]] = {
    "completion": body("Once there", max_tokens=20),
    "choices": body("One", n=3, max_tokens=10),
    "prompts": body(["A", "Two cats", "Three"], max_tokens=8),
    "ids": body([5, 6, 7], max_tokens=12),
    "logprobs": body("Why", logprobs=5, max_tokens=6),
    "echo": body("This is the prompt", echo=True, logprobs=1, max_tokens=4),
    "chat": chat_body(temperature=0, logit_bias={}),
    "chat logprobs": chat_body("Hello!", logprobs=True, top_logprobs=3, max_tokens=8),
    "usage": body("Red", max_tokens=9, seed=3),
    "stop": body("Stop", stop=["a", "e"], max_tokens=30),
}
WRONG: dict[str, dict[str, Any]] = {
    "range": body(temperature=9),
    "type": body(n="three"),
    "unknown": body(max_token=3),
    "model": body(model="nobody/none"),
    "long": body("a " * 5000),
    "template": chat_body(chat_template_kwargs={"messages": []}),
    "tools": chat_body(tools=[{"type": "function"}]),
}


class Storm:
    """Workers with a client each; how a call of theirs goes is drawn."""

    def __init__(self, server: Server, expected: dict[str, Heard]) -> None:
        self._server = server
        self._expected = expected
        self._random = random.Random(5)
        self._num_begun = 0
        self.num_right = self.num_refused = self.num_broken_off = 0

    async def run(self, num_calls: int) -> None:
        """Until so many were begun in all."""
        async with asyncio.TaskGroup() as group:
            for _ in range(NUM_ACROSS):
                group.create_task(self._work(num_calls))

    async def _work(self, num_calls: int) -> None:
        async with self._server.http() as http, self._server.engine.client() as client:
            web = Web(http, client)
            while self._num_begun < num_calls:
                self._num_begun += 1
                drawn = self._random.random()
                if drawn < BROKEN_OFF:
                    await self._break_off()
                elif drawn < 2 * BROKEN_OFF:
                    await self._wrong(web)
                else:
                    await self._right(web)

    async def _right(self, web: Web) -> None:
        name = self._random.choice(list(RIGHT))
        ask = self._random.choice((web.stream, web.whole))
        assert await ask(RIGHT[name]) == self._expected[name], name
        self.num_right += 1

    async def _wrong(self, web: Web) -> None:
        name = self._random.choice(list(WRONG))
        ask = self._random.choice((web.stream, web.whole))
        assert await ask(WRONG[name]) == self._expected[name], name
        self.num_refused += 1

    async def _break_off(self) -> None:
        """Somewhere in the request, before the answer, or in it."""
        data = request_bytes(
            body("Long", n=self._random.choice((1, 3)), max_tokens=500, stream=True)
        )
        raw = await Raw.open(self._server.port)
        await raw.send(data[: self._random.choice((self._random.randrange(len(data)), None))])
        await asyncio.wait(
            [asyncio.create_task(raw.reader.read(1))], timeout=self._random.random() * 0.1
        )
        self._random.choice((raw.end, raw.reset))()
        self.num_broken_off += 1


def processes(server: Server) -> Callable[[], dict[str, int]]:
    names = ("core", "gateway", "shim")
    return lambda: {
        "supervisor": server.engine.process.pid,
        **{name: server.engine.pid_of(name) for name in names},
    }


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.mark.slow
def test_storm_of_calls_is_answered_and_leaves_nothing(server: Server) -> None:
    async def use(web: Web) -> None:
        expected = {name: await web.whole(asked) for name, asked in (RIGHT | WRONG).items()}
        assert {one.status for name, one in expected.items() if name in RIGHT} == {200}
        assert {one.status for name, one in expected.items() if name in WRONG} <= {400, 404}
        storm, began, pids = Storm(server, expected), time.monotonic(), processes(server)
        await storm.run(NUM_WARM_UP)
        warm = await settled(web.grpc, pids)
        await storm.run(NUM_BEFORE)
        before = await settled(web.grpc, pids)
        await storm.run(NUM_CALLS)
        took_s = time.monotonic() - began
        after = await settled(web.grpc, pids)
        print(f"{NUM_CALLS} calls in {took_s:.0f} s, {storm.num_right} of them answered right")
        print(f"held after {NUM_BEFORE}: {before}; after {NUM_CALLS}: {after}")
        assert took_s < MOST_STORM_S
        assert storm.num_right > NUM_CALLS / 2
        assert storm.num_refused > NUM_CALLS / 20
        assert storm.num_broken_off > NUM_CALLS / 20
        assert {name: one.num_fds for name, one in after.items()} == {
            name: one.num_fds for name, one in warm.items()
        }
        require_no_growth(before, after)
        metrics = await web.grpc.metrics()
        for count in ("core_restarts", "core_failed_steps", "compiles_after_warm_up"):
            assert metrics[f"quire_{count}_total"] == 0, count

    server.run(use)
