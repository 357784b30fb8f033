"""`quire engine` from its start to its first answer, and what it says of restarts."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from quire.protos.quire.v1 import inference_pb2 as pb

from .engines import Client, Engine, free_port, generate, until
from .gateways import status_of

# From the command to the line that says ready; 4 to 5 s with compiled programs, without 10.
MOST_START_S = 40.0
MOST_HELP_S = 3.0


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(port=free_port()) as engine:
        yield engine


def test_start_says_when_it_is_ready_and_where(engine: Engine) -> None:
    engine.until_said("quire: ready in ")
    (ready,) = re.findall(r"^quire: (.*)\n", engine.said, re.MULTILINE)
    assert re.match(r"ready in \d+\.\d s, serving on 127\.0\.0\.1:\d+ \(gRPC\)", ready), ready
    print(f"quire engine: ready after {engine.start_s} s")
    assert engine.start_s < MOST_START_S


def test_ready_line_is_true(engine: Engine) -> None:
    """Whoever reads it can ask at once."""

    async def use(client: Client) -> None:
        assert await client.is_serving()
        assert (await client.ask(generate())).num_tokens == 48

    engine.run(use)


def test_start_refuses_requests_until_it_serves() -> None:
    port = free_port()

    async def use(client: Client) -> None:
        async def is_there() -> bool:
            try:
                await client.metrics()
            except grpc.aio.AioRpcError:
                return False
            return True

        await until(is_there)
        assert not await client.is_serving()
        status = await status_of(client.stub.Generate(generate()))
        assert status.code is grpc.StatusCode.UNAVAILABLE
        assert status.message == "the engine is starting; try again in 1 s"
        assert status.retry_after_s == 1

    async def run() -> None:
        async with Client(f"127.0.0.1:{port}") as client:
            await use(client)

    with Engine(port=port) as starting:
        asyncio.run(run())
        assert "ready in" not in starting.said


def test_restarts_are_counted_across_both_processes(engine: Engine) -> None:
    """A gateway that is new itself knows of the core's."""

    async def use(client: Client) -> None:
        assert (await client.metrics())["quire_core_restarts_total"] == 0
        for name in ("core", "gateway"):
            os.kill(engine.pid_of(name), signal.SIGKILL)
            engine.until_said(f"quire: the {name} is ready again after ")
            await client.until_serving()
            assert (await client.metrics())["quire_core_restarts_total"] == 1
            facts = await client.stub.GetServerInfo(pb.GetServerInfoRequest())
            assert facts.core_restarts == 1
        assert "the core ended (killed by SIGKILL); restarting it (1 of 5 times" in engine.said

    engine.run(use)


def test_help_is_there_at_once() -> None:
    command = Path(sys.executable).with_name("quire")
    started = time.perf_counter()
    done = subprocess.run(
        [command, "engine", "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    took_s = time.perf_counter() - started
    print(f"quire engine --help: {took_s:.2f} s")
    assert done.returncode == 0
    assert "--grpc-port PORT" in done.stdout
    assert took_s < MOST_HELP_S
