"""Thousands of requests that end in every way there is: nothing of them stays."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from quire.protos.quire.v1 import inference_pb2 as pb
from quire.serving.gateway.core_link import MAX_RESUMES

from .engines import Client, Engine, Proxy, Result, generate, until
from .footprints import require_no_growth, settled

NUM_WARM_UP, NUM_BEFORE, NUM_REQUESTS = 200, 1_000, 5_000
NUM_ACROSS = 2_000
NUM_WORKERS, NUM_IN_SESSION = 24, 8
MOST_STORM_S = 180.0


class Storm:
    """Workers with a connection each; how a request of theirs goes is drawn."""

    def __init__(self, address: str, expected: dict[int, Result]) -> None:
        """expected: what some seeds answer, whatever happens beside them."""
        self._address = address
        self._expected = expected
        self._random = random.Random(5)
        self._num_begun = 0
        self.num_read = 0
        weight_by_way = {
            self._read: 6,
            self._ask: 2,
            self._ask_and_cancel: 1,
            self._cancel: 3,
            self._deadline: 2,
            self._abort: 2,
            self._reset: 1,
            self._session: 1,
        }
        self._ways, self._weights = list(weight_by_way), list(weight_by_way.values())

    async def run(self, num_requests: int) -> None:
        """Until so many were begun in all."""
        async with asyncio.TaskGroup() as group:
            for _ in range(NUM_WORKERS):
                group.create_task(self._work(num_requests))

    async def until_begun(self, num_requests: int) -> None:
        async def are_begun() -> bool:
            return self._num_begun >= num_requests

        await until(are_begun)

    async def _work(self, num_requests: int) -> None:
        async with Client(self._address) as client:
            while self._num_begun < num_requests:
                self._num_begun += 1
                (way,) = self._random.choices(self._ways, self._weights)
                await way(client)

    async def _read(self, client: Client) -> None:
        seed = self._random.choice(list(self._expected))
        assert await client.stream(short(seed)) == self._expected[seed]
        self.num_read += 1

    async def _ask(self, client: Client) -> None:
        seed = self._random.choice(list(self._expected))
        assert await client.ask(short(seed)) == self._expected[seed]
        self.num_read += 1

    async def _ask_and_cancel(self, client: Client) -> None:
        call = client.stub.Generate(self._long())
        await asyncio.sleep(self._random.random() * 0.05)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    async def _cancel(self, client: Client) -> None:
        call = client.stub.GenerateStream(self._long())
        await self._read_some(call)
        call.cancel()

    async def _deadline(self, client: Client) -> None:
        call = client.stub.GenerateStream(self._long(), timeout=self._random.uniform(0.001, 0.2))
        try:
            await read_all(call)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise

    async def _abort(self, client: Client) -> None:
        request = self._long()
        call = client.stub.GenerateStream(request)
        await self._read_some(call)
        await client.stub.Abort(pb.AbortRequest(request_ids=[request.request_id]))
        await read_all(call)

    async def _reset(self, _: Client) -> None:
        async with Proxy(self._address) as proxy, Client(proxy.address) as client:
            call = client.stub.GenerateStream(self._long())
            await self._read_some(call)
            proxy.reset()
            call.cancel()

    async def _session(self, client: Client) -> None:
        """Several: some are cancelled, some too late, and the call too ends in several ways."""
        self._num_begun += NUM_IN_SESSION - 1
        async with Proxy(self._address) as proxy, Client(proxy.address) as other:
            ending = self._random.choice(("half close", "cancel", "reset"))
            call = (other if ending == "reset" else client).stub.Session()
            for number in range(1, NUM_IN_SESSION + 1):
                timeout_ns = self._random.choice((0, 0, self._random.randrange(1, 10**8)))
                request = generate(seed=number, max_tokens=self._random.choice((5, 20, 300)))
                submit = pb.SessionSubmit(id=number, generate=request, timeout_ns=timeout_ns)
                await call.write(pb.SessionRequest(submit=submit))
            for number in self._random.sample(range(1, NUM_IN_SESSION + 1), 3):
                await call.write(pb.SessionRequest(cancel=pb.SessionCancel(id=number)))
            if ending == "half close":
                await call.done_writing()
                while (response := await call.read()) is not grpc.aio.EOF:
                    require_well_formed(response)
                return
            require_well_formed(await call.read())
            if ending == "reset":
                proxy.reset()
            call.cancel()

    def _long(self) -> pb.GenerateRequest:
        """One that does not end by itself before it is broken off."""
        request = generate(seed=1, max_tokens=500, n=self._random.choice((1, 1, 1, 3)))
        request.request_id = f"storm {self._num_begun} {self._random.random()}"
        return request

    async def _read_some(self, call: Any) -> None:
        for _ in range(self._random.randrange(12)):
            assert await call.read() is not grpc.aio.EOF


def short(seed: int) -> pb.GenerateRequest:
    return generate(f"Question {seed}:", seed=seed, max_tokens=1 + seed % 30)


async def read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def require_well_formed(response: Any) -> None:
    """Of a session: deltas, and deadlines that have passed."""
    assert response is not grpc.aio.EOF
    for event in response.events:
        assert 1 <= event.id <= NUM_IN_SESSION
        if event.HasField("error"):
            assert event.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


def processes(engine: Engine) -> Callable[[], dict[str, int]]:
    return lambda: {name: engine.pid_of(name) for name in ("core", "gateway")}


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine() as engine:
        yield engine


@pytest.mark.slow
def test_storm_of_broken_off_requests_leaves_nothing(engine: Engine) -> None:
    async def use(client: Client) -> None:
        expected = {seed: await client.stream(short(seed)) for seed in range(30, 46)}
        storm, began = Storm(engine.address, expected), time.monotonic()
        await storm.run(NUM_WARM_UP)
        warm = await settled(client, processes(engine))
        await storm.run(NUM_BEFORE)
        before = await settled(client, processes(engine))
        await storm.run(NUM_REQUESTS)
        took_s = time.monotonic() - began
        after = await settled(client, processes(engine))
        print(f"{NUM_REQUESTS} requests in {took_s:.0f} s, {storm.num_read} of them read whole")
        print(f"held after {NUM_BEFORE}: {before}; after {NUM_REQUESTS}: {after}")
        assert took_s < MOST_STORM_S
        assert storm.num_read > NUM_REQUESTS / 5
        assert {name: one.num_fds for name, one in after.items()} == {
            name: one.num_fds for name, one in warm.items()
        }
        require_no_growth(before, after)
        metrics = await client.metrics()
        for count in ("core_restarts", "core_failed_steps", "compiles_after_warm_up"):
            assert metrics[f"quire_{count}_total"] == 0, count

    engine.run(use)


@pytest.mark.slow
def test_storm_across_killed_cores_changes_no_answer(engine: Engine) -> None:
    """As many as a request may lose; what is cancelled meanwhile does not come back."""

    async def use(client: Client) -> None:
        expected = {seed: await client.stream(short(seed)) for seed in range(30, 46)}
        storm = Storm(engine.address, expected)
        raging = asyncio.create_task(storm.run(NUM_ACROSS))
        for number in range(1, MAX_RESUMES + 1):
            await storm.until_begun(number * NUM_ACROSS // (MAX_RESUMES + 1))
            os.kill(engine.pid_of("core"), signal.SIGKILL)
            await client.until_serving(is_so=False)
            await client.until_serving()
        await raging
        await settled(client, processes(engine))
        metrics = await client.metrics()
        assert storm.num_read > NUM_ACROSS / 5
        assert metrics["quire_requests_resumed_total"] > MAX_RESUMES
        assert metrics["quire_core_restarts_total"] == MAX_RESUMES
        assert metrics["quire_requests_finished_total/error"] == 0

    engine.run(use)
