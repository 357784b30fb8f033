"""A core process for tests, started as a supervisor starts it, and what comes over its socket."""

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quire.engine.core_io import StepOutput, Submission
from quire.engine.errors import EngineStopped
from quire.serving.core_client.client import CoreClient, CoreStatus, CoreStream
from quire.serving.supervisor.channel import FLAG

from ...llm.engines import REFERENCE, SMALL

OPTIONS: dict[str, Any] = {"model": str(REFERENCE / "llama32_tied"), **SMALL}
WAIT_S = 60.0


@contextmanager
def core_process(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A ready core that listens at `path`; ended with its channel."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "quire.serving.core", FLAG, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        options = {"engine": OPTIONS, "secret": "00" * 32, "socket": str(path)}
        ours.sendall(json.dumps(options).encode() + b"\n")
        ours.settimeout(WAIT_S)
        try:
            with ours.makefile("rb") as lines:
                events = [json.loads(line)["event"] for line in until_ready(lines)]
            assert events[-1] == "ready", f"the core did not start: {events}"
            assert {"phase", "progress"} <= set(events)
            yield process
        finally:
            ours.close()
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise AssertionError("the core outlived its supervisor") from None


def until_ready(lines: Iterable[bytes]) -> Iterator[bytes]:
    for line in lines:
        yield line
        if b'"ready"' in line:
            return


async def finish(
    stream: CoreStream, submissions: Iterable[Submission]
) -> dict[str, list[StepOutput]]:
    """Every output of the submissions, by request id."""
    submissions = list(submissions)
    stream.submit(submissions)
    return await read(stream, {s.request_id for s in submissions})


async def read(stream: CoreStream, request_ids: set[str]) -> dict[str, list[StepOutput]]:
    """Outputs until each of these requests has ended."""
    outputs: dict[str, list[StepOutput]] = {request_id: [] for request_id in request_ids}
    open_ids = set(request_ids)
    async with asyncio.timeout(WAIT_S):
        async for step in stream:
            for output in step:
                outputs.setdefault(output.request_id, []).append(output)
                if output.finish_reason is not None:
                    open_ids.discard(output.request_id)
            if not open_ids:
                return outputs
    raise AssertionError(f"the stream ended before {open_ids}")


async def until(client: CoreClient, is_so: Callable[[CoreStatus], bool]) -> CoreStatus:
    """The first status for which it is so."""
    async with asyncio.timeout(WAIT_S):
        while not is_so(status := await client.status(5)):
            await asyncio.sleep(0.01)
    return status


def is_idle(status: CoreStatus) -> bool:
    """Nothing runs and no request holds a page."""
    is_free = status.num_free_pages == status.num_pages
    return is_free and not (status.has_work or status.num_running or status.num_waiting)


async def ended_because(stream: CoreStream) -> str:
    """Read a stream to its end; why the core ended it."""
    try:
        async with asyncio.timeout(WAIT_S):
            async for _ in stream:
                pass
    except EngineStopped as error:
        return str(error)
    return ""


def token_ids(outputs: Iterable[StepOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]
