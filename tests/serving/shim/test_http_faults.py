"""Processes of `quire serve` killed and stopped under load: what was asked for over HTTP is
answered as if nothing had happened, or refused in OpenAI's words, and the server goes on.
"""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest

from ..core.cores import is_idle
from ..supervisor.supervised import is_alive, wait_until
from .servers import COMPLETIONS, Heard, Server, Web, body, chat_body, until_events

# Long enough for a step on a busy machine.
STEP_TIMEOUT_S = 3.0
# Tokens of an answer, and of one that begins before the others; and how many events are there when
# harm is done: many are left.
NUM_TOKENS, NUM_WHOLE, NUM_BEFORE = 600, 1200, 20
LOST = "the engine was lost while this request was under way; send it again"

Load = dict[str, Heard]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("--step-timeout", f"{STEP_TIMEOUT_S:g}") as server:
        yield server


def long(seed: int, **fields: Any) -> dict[str, Any]:
    """Each with a prompt of its own."""
    own = {"prompt": f"Story {seed}:", "max_tokens": NUM_TOKENS}
    return body(seed=seed, **own | fields)


STREAMED = {
    "plain": long(1),
    "chat": chat_body("Tell me a story.", max_tokens=NUM_TOKENS),
    "choices": long(2, n=2),
    "logprobs": long(3, logprobs=2),
    "prompts": long(4, prompt=["One", "Two and"]),
    "echo": long(5, echo=True),
}
WHOLE = {
    "whole": long(6, n=2, max_tokens=NUM_WHOLE),
    "whole chat": chat_body("Who?", max_tokens=NUM_WHOLE, logprobs=True),
}
NUM_REQUESTS = len(STREAMED) + 1 + len(WHOLE)  # two prompts are two requests


async def answers(web: Web, harm: Callable[[], Awaitable[None]] | None = None) -> Load:
    """To all of them at once, by name. harm: done when each of them is under way."""
    streamed = {name: Heard() for name in STREAMED}
    async with asyncio.TaskGroup() as group:
        whole = {name: group.create_task(web.whole(asked)) for name, asked in WHOLE.items()}
        await web.grpc.until_metrics(lambda m: m["quire_requests_open"] == len(WHOLE))
        for name, asked in STREAMED.items():
            group.create_task(web.stream(asked, streamed[name]))
        await until_events(1, *streamed.values())
        if harm is not None:
            await harm()
    return streamed | {name: task.result() for name, task in whole.items()}


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> Load:
    found: Load = {}

    async def use(web: Web) -> None:
        found.update(await answers(web))

    server.run(use)
    assert {name: sorted(one.choices) for name, one in found.items() if len(one.choices) > 1} == {
        "choices": [0, 1],
        "prompts": [0, 1],
        "whole": [0, 1],
    }
    for one in found.values():
        assert one.is_done
        assert {choice.finish_reason for choice in one.choices.values()} == {"length"}
    assert len(found["logprobs"].choices[0].logprobs) == NUM_TOKENS
    return found


@pytest.mark.slow
def test_core_killed_under_streams_changes_no_answer(server: Server, undisturbed: Load) -> None:
    async def use(web: Web) -> None:
        shim = server.engine.pid_of("shim")

        async def kill() -> None:
            os.kill(server.engine.pid_of("core"), signal.SIGKILL)
            await web.until_health(503)
            await web.until_health(200)

        assert await answers(web, kill) == undisturbed
        assert (await web.grpc.metrics())["quire_requests_resumed_total"] >= NUM_REQUESTS
        assert server.engine.pid_of("shim") == shim

    server.run(use)


@pytest.mark.slow
def test_stopped_core_is_replaced_and_changes_no_answer(server: Server, undisturbed: Load) -> None:
    async def use(web: Web) -> None:
        core = server.engine.pid_of("core")

        async def stop() -> None:
            os.kill(core, signal.SIGSTOP)
            await web.until_health(503)
            await web.until_health(200)

        assert await answers(web, stop) == undisturbed
        assert not is_alive(core)

    server.run(use)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_gateway_is_an_error_event_or_503_and_is_replaced(
    server: Server, undisturbed: Load, number: signal.Signals
) -> None:
    async def use(web: Web) -> None:
        core, gateway = server.engine.pid_of("core"), server.engine.pid_of("gateway")
        shim = server.engine.pid_of("shim")

        async def harm() -> None:
            os.kill(gateway, number)
            await web.until_health(503)

        found = await answers(web, harm)
        for name in STREAMED:
            heard = found[name]
            assert (heard.status, heard.is_done) == (200, True)
            require_error(heard, 503, LOST)
            for index, choice in heard.choices.items():
                assert undisturbed[name].choices[index].text.startswith(choice.text)
                assert choice.finish_reason is None
        for name in WHOLE:
            assert found[name].status == 503
            require_error(found[name], 503, LOST)
            assert int(found[name].headers["retry-after"]) >= 1
        assert not is_alive(gateway) or number is signal.SIGSTOP
        await web.until_health(200)
        await server.engine.until_core(is_idle)
        assert await web.stream(STREAMED["plain"]) == undisturbed["plain"]
        assert (server.engine.pid_of("core"), server.engine.pid_of("shim")) == (core, shim)
        assert server.engine.pid_of("gateway") != gateway

    server.run(use)


def require_error(heard: Heard, status: int, message: str) -> None:
    kinds = {503: ("server_error", "service_unavailable")}
    kind, code = kinds[status]
    assert heard.error == {"message": message, "type": kind, "param": None, "code": code}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_shim_is_replaced_and_its_requests_end(
    server: Server, undisturbed: Load, number: signal.Signals
) -> None:
    """Nobody asked it whether it moves: one that stood still kept its port for ever."""

    async def use(web: Web) -> None:
        others = [server.engine.pid_of(name) for name in ("core", "gateway")]
        shim, heard = server.engine.pid_of("shim"), Heard()
        call = asyncio.create_task(web.stream(long(1, max_tokens=1900), heard))
        await until_events(NUM_BEFORE, heard)
        os.kill(shim, number)
        with pytest.raises(httpx.TransportError):
            await call
        assert not heard.is_done
        await web.until_free()
        await web.until_health(200)
        assert not is_alive(shim)
        assert [server.engine.pid_of(name) for name in ("core", "gateway")] == others
        assert await web.stream(STREAMED["chat"]) == undisturbed["chat"]
        if number is signal.SIGSTOP:
            assert f"the shim ended (it has not answered for {STEP_TIMEOUT_S:g} s" in (
                server.engine.said
            )

    server.run(use)


@pytest.mark.slow
def test_one_of_two_shims_that_is_killed_leaves_the_other_to_serve() -> None:
    with Server("--api-server-count", "2") as server:
        server.engine.until_said("quire: ready in ")

        async def use(web: Web) -> None:
            undisturbed = await web.stream(long(1))
            streams = [Heard() for _ in range(12)]
            calls = [asyncio.create_task(web.stream(long(1), heard)) for heard in streams]
            await until_events(1, *streams)
            killed, kept = server.engine.pids_of("shim")
            os.kill(killed, signal.SIGKILL)
            asking = asyncio.create_task(ask_until_two_are_there(server, killed))
            ends = await asyncio.gather(*calls, return_exceptions=True)
            assert any(isinstance(end, httpx.TransportError) for end in ends), "all on one shim"
            whole = [end for end in ends if not isinstance(end, httpx.TransportError)]
            assert whole == [undisturbed] * len(whole) != []
            assert kept in server.engine.pids_of("shim")
            statuses = await asking
            assert set(statuses) == {200}, statuses

        server.run(use)


async def ask_until_two_are_there(server: Server, killed: int) -> list[int]:
    """The statuses of calls that are made meanwhile, each on a connection of its own. What was sent
    to the one that was killed, and not taken, is not counted.
    """
    statuses: list[int] = []
    said = "is ready again after"
    while said not in server.engine.said or len(statuses) < 20:
        async with server.http() as http:
            try:
                answer = await http.post(COMPLETIONS, json=body(max_tokens=1))
            except httpx.TransportError:
                assert not is_alive(killed)
                continue
            statuses.append(answer.status_code)
    return statuses


@pytest.mark.slow
def test_killed_supervisor_takes_all_with_it_and_the_ports_are_free() -> None:
    grpc_port = 0
    with Server() as server:
        server.engine.until_said("quire: ready in ")
        children = server.engine.children()
        assert len(children) == 3
        grpc_port = int(server.engine.address.rpartition(":")[2])

        async def kill() -> None:
            async with server.http() as http, server.engine.client() as client:
                heard = Heard()
                call = asyncio.create_task(Web(http, client).stream(long(1), heard))
                await until_events(NUM_BEFORE, heard)
                server.engine.process.kill()
                with pytest.raises(httpx.TransportError):
                    await call

        asyncio.run(kill())
        wait_until(lambda: not any(map(is_alive, children)), timeout_s=2)
    with Server(port=server.port, grpc_port=grpc_port) as again:

        async def use(web: Web) -> None:
            assert (await web.whole(chat_body(temperature=0))).choices[0].text != ""

        again.run(use)
