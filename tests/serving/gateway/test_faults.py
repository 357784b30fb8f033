"""Processes of `quire engine` killed and stopped under load: what was asked for is answered as if
nothing had happened, or refused with a status, and the engine goes on.
"""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator

import grpc
import pytest
from quire.protos.quire.v1 import inference_pb2 as pb

from ..core.cores import is_idle
from ..supervisor.supervised import is_alive, wait_until
from .engines import Client, Engine, Result, free_port, generate, until_tokens
from .gateways import status_of

# Long enough for a step on a busy machine.
STEP_TIMEOUT_S = 3.0
# Or on a busy machine so many times what the engine's start took.
MOST_KILL_TO_SERVING_S, MOST_STARTS = 10.0, 2.0
# Tokens of an answer, and how many of them are there when harm is done: many are left.
NUM_TOKENS, NUM_BEFORE = 400, 20
NUM_IN_SESSION = 4
# Of one that is alone when it is done.
ALONE = {"logprobs": 2, "max_tokens": 900}
# Of one that must not be done when harm is: seconds of work.
ENDLESS = {"n": 8, "max_tokens": 1900}

Load = dict[str, Result]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """The port stays the same when the gateway is another."""
    with Engine("--step-timeout", f"{STEP_TIMEOUT_S:g}", port=free_port()) as engine:
        yield engine


def long(seed: int, **params: object) -> pb.GenerateRequest:
    """Each with a prompt of its own."""
    return generate(f"Story {seed}:", seed=seed, **{"max_tokens": NUM_TOKENS} | params)


class Streams:
    """Requests of every kind under way at once."""

    def __init__(self, client: Client, connect: Callable[[], Client], stop: str) -> None:
        """connect: makes another client. stop: a text that comes late in the answer to long(4)."""
        self._client = client
        self._connect = connect
        self._requests = {
            "plain": long(1),
            "greedy": long(2, temperature=0, logit_bias={}, ignore_eos=True),
            "alone": long(3, **ALONE),
            "stop string": long(4, stop=[stop]),
            "three choices": long(5, n=3),
            "penalties": long(6, repetition_penalty=1.2, frequency_penalty=0.3, top_p=0.9),
            "bad words": long(7, bad_words=["the", " a"]),
            "last of the prompt": long(8, prompt_logprobs=1),
        }
        self._streamed: Load = {name: Result() for name in self._requests}
        self._in_session = [Result() for _ in range(NUM_IN_SESSION)]

    @property
    def num_requests(self) -> int:
        return len(self._requests) + 1 + NUM_IN_SESSION

    async def run(self, harm: Callable[[], Awaitable[None]] | None = None) -> Load:
        """All that came, by name. harm: done when each of them has a first token."""
        client = self._client
        async with asyncio.TaskGroup() as group:
            for name, request in self._requests.items():
                group.create_task(client.stream(request, self._streamed[name]))
            whole = group.create_task(client.ask(long(9, n=2, logprobs=0)))
            requests = [long(10 + number) for number in range(NUM_IN_SESSION)]
            group.create_task(client.session(requests, self._in_session))
            await self._until_all_have_begun()
            if harm is not None:
                await harm()
        session = {f"session {number}": one for number, one in enumerate(self._in_session)}
        return {**self._streamed, **session, "whole": whole.result()}

    async def _until_all_have_begun(self) -> None:
        """In the gateway: it may take a while until it is read here."""

        def have_begun(metrics: dict[str, float]) -> bool:
            num_open, num_queued = (metrics[f"quire_requests_{a}"] for a in ("open", "queued"))
            return num_open == self.num_requests and num_queued == 0

        async with self._connect() as other:
            await other.until_metrics(have_begun)


@pytest.fixture(scope="module")
def stop(engine: Engine) -> str:
    """A text that is first in the last third of long(4)'s answer."""
    found = []

    async def use(client: Client) -> None:
        text = (await client.stream(long(4))).answers[0].text
        places = range(len(text) * 2 // 3, len(text) - 12)
        found.append(next(text[i : i + 12] for i in places if text.find(text[i : i + 12]) == i))

    engine.run(use)
    return found[0]


@pytest.fixture(scope="module")
def undisturbed(engine: Engine, stop: str) -> Load:
    results: Load = {}

    async def use(client: Client) -> None:
        results.update(await Streams(client, engine.client, stop).run())

    engine.run(use)
    assert results["stop string"].answers[0].stop_reason == stop
    assert results["stop string"].num_tokens > NUM_TOKENS // 2
    assert len(results["alone"].answers[0].logprobs) == ALONE["max_tokens"]
    return results


def test_core_killed_under_streams_changes_no_answer(
    engine: Engine, undisturbed: Load, stop: str
) -> None:
    async def use(client: Client) -> None:
        streams = Streams(client, engine.client, stop)

        async def kill() -> None:
            killed = time.monotonic()
            os.kill(engine.pid_of("core"), signal.SIGKILL)
            await client.until_serving(is_so=False)
            await client.until_serving()
            took_s = time.monotonic() - killed
            print(f"kill of the core to serving: {took_s:.1f} s")
            assert took_s < max(MOST_KILL_TO_SERVING_S, MOST_STARTS * engine.start_s)

        before = await client.metrics()
        results = await streams.run(kill)
        assert [name for name, one in results.items() if not one.was_resumed] == []
        assert results == undisturbed
        after = await client.metrics()
        assert after["quire_core_restarts_total"] == before["quire_core_restarts_total"] + 1
        num_resumed = after["quire_requests_resumed_total"] - before["quire_requests_resumed_total"]
        assert num_resumed == streams.num_requests

    engine.run(use)


@pytest.mark.slow
def test_core_killed_twice_during_one_answer_changes_nothing(
    engine: Engine, undisturbed: Load
) -> None:
    async def use(client: Client) -> None:
        result = Result()
        reading = asyncio.create_task(client.stream(long(3, **ALONE), result))
        for _ in range(2):
            await until_tokens([result], result.num_tokens + NUM_BEFORE)
            os.kill(engine.pid_of("core"), signal.SIGKILL)
            await client.until_serving(is_so=False)
            await client.until_serving()
        assert await reading == undisturbed["alone"]
        assert result.was_resumed

    engine.run(use)


def test_stopped_core_is_replaced_and_changes_no_answer(engine: Engine, undisturbed: Load) -> None:
    async def use(client: Client) -> None:
        result, core = Result(), engine.pid_of("core")
        reading = asyncio.create_task(client.stream(long(3, **ALONE), result))
        await until_tokens([result], NUM_BEFORE)
        os.kill(core, signal.SIGSTOP)
        await client.until_serving(is_so=False, timeout_s=2 * STEP_TIMEOUT_S)
        await client.until_serving()
        assert not is_alive(core)
        assert await reading == undisturbed["alone"]
        assert result.was_resumed
        assert f"it has not answered for {STEP_TIMEOUT_S:g} s" in engine.said

    engine.run(use)


def test_stopped_gateway_is_replaced(engine: Engine) -> None:
    """Nobody asked it whether it moves."""

    async def use(client: Client) -> None:
        gateway = engine.pid_of("gateway")
        os.kill(gateway, signal.SIGSTOP)
        await asyncio.to_thread(wait_until, lambda: not is_alive(gateway))
        await client.until_serving()
        assert engine.pid_of("gateway") != gateway

    engine.run(use)


def test_killed_gateway_ends_calls_as_unavailable_and_is_replaced(
    engine: Engine, undisturbed: Load
) -> None:
    async def use(client: Client) -> None:
        core, gateway = engine.pid_of("core"), engine.pid_of("gateway")
        address, result = engine.address, Result()
        session = [Result(), Result()]
        calls = [
            asyncio.create_task(status_of(call))
            for call in (
                client.stream(long(1, **ENDLESS), result),
                client.session([long(2, **ENDLESS), long(3, **ENDLESS)], session),
                client.ask(generate(**ENDLESS)),
            )
        ]
        await until_tokens([result, *session], NUM_BEFORE)
        os.kill(gateway, signal.SIGKILL)
        for call in calls:
            assert (await call).code is grpc.StatusCode.UNAVAILABLE
        await engine.until_core(is_idle)
        await client.until_serving()
        assert await client.stream(long(1)) == undisturbed["plain"]
        assert engine.pid_of("core") == core
        assert engine.pid_of("gateway") != gateway
        assert engine.address == address

    engine.run(use)


def test_killed_supervisor_takes_all_with_it_and_the_port_is_free() -> None:
    port = free_port()

    async def kill(client: Client) -> None:
        result = Result()
        call = asyncio.create_task(status_of(client.stream(long(1, **ENDLESS), result)))
        await until_tokens([result], NUM_BEFORE)
        engine.process.kill()
        assert (await call).code is grpc.StatusCode.UNAVAILABLE

    async def run() -> None:
        async with engine.client() as client:
            await kill(client)

    with Engine(port=port) as engine:
        engine.until_said("quire: ready in ")
        children = engine.children()
        assert len(children) == 2
        asyncio.run(run())
        wait_until(lambda: not any(map(is_alive, children)), timeout_s=2)
    with Engine(port=port) as engine:

        async def use(client: Client) -> None:
            assert (await client.ask(generate())).num_tokens == 48

        engine.run(use)
