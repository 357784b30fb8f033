"""What the gateway costs and how it holds its pace, in front of a core that costs nothing.

The gateway is a process of its own and its processor time is read from the system, so neither the
client nor the fake core counts. One text delta per token and stream: the client checks that.

python -m quire.bench.gateway
"""

import asyncio
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import uvloop
from quire.protos.quire.v1 import inference_pb2 as pb
from quire.protos.quire.v1 import inference_pb2_grpc
from quire.serving.supervisor.child import Child, Process

from .report import emit, line

NUM_STREAMS, SECONDS = 256, 10.0
SESSION_STEP_MS, CALLS_STEP_MS, GAP_STEP_MS = 10.0, 5.0, 10.0
MOST_US_PER_TOKEN, MOST_GAP_MS = 12, 20
NUM_LONG_PROMPTS, LONG_TOKENS = 20, 8192
_TICKS = os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def gateway(step_ms: float) -> AsyncIterator[tuple[str, int]]:
    """A gateway in front of a fake core: its address and process id."""
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "core.sock"
        core = subprocess.Popen(
            [sys.executable, "-m", "quire.bench.fake_core", str(socket), str(step_ms)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert core.stdout is not None
        core.stdout.readline()
        options = {
            "engine": {},
            "serve": {"grpc_port": 0},
            "core_socket": str(socket),
            "front_socket": str(Path(folder) / "gateway.sock"),
            "ping_socket": str(Path(folder) / "ping.sock"),
            "secret": "00" * 32,
        }
        command = (sys.executable, "-P", "-m", "quire.serving.gateway")
        process = await Process.start(Child("gateway", command, options))
        try:
            async for message in process.messages():
                if message["event"] == "ready":
                    break
            yield message["address"].split()[0], process.pid
        finally:
            process.close()
            await process.wait()
            core.communicate()


async def stub_of(address: str) -> tuple[grpc.aio.Channel, inference_pb2_grpc.InferenceStub]:
    """Once the gateway serves."""
    channel = grpc.aio.insecure_channel(address)
    stub = inference_pb2_grpc.InferenceStub(channel)
    for _ in range(500):
        try:
            await stub.ListModels(pb.ListModelsRequest())
            return channel, stub
        except grpc.aio.AioRpcError as error:
            why = error
            await asyncio.sleep(0.02)
    raise SystemExit(f"the gateway does not serve: {why}")


def processor_s(pid: int) -> float:
    """Processor time of a process so far, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def request(text: str = "Once upon a time") -> pb.GenerateRequest:
    params = pb.SamplingParams(max_tokens=10_000, ignore_eos=True, seed=1)
    return pb.GenerateRequest(text=text, sampling_params=params)


class Sessions:
    """A Session call with many streams, and when its messages came."""

    def __init__(self, stub: inference_pb2_grpc.InferenceStub) -> None:
        self._call = stub.Session()
        self.num_deltas = 0
        self.num_tokens = 0
        self.arrivals: list[float] = []

    async def submit(self, first: int, count: int, text: str = "Once upon a time") -> None:
        for number in range(first, first + count):
            submit = pb.SessionSubmit(id=number, generate=request(text))
            await self._call.write(pb.SessionRequest(submit=submit))

    async def cancel(self, number: int) -> None:
        await self._call.write(pb.SessionRequest(cancel=pb.SessionCancel(id=number)))

    async def read(self) -> None:
        """Until cancelled."""
        async for message in self._call:
            self.arrivals.append(time.perf_counter())
            for event in message.events:
                if not event.delta.token_ids:
                    raise SystemExit(f"not a delta of a token: {event}")
                self.num_deltas += 1
                self.num_tokens += len(event.delta.token_ids)

    def close(self) -> None:
        self._call.cancel()


async def session_cost() -> None:
    async with gateway(SESSION_STEP_MS) as (address, pid):
        channel, stub = await stub_of(address)
        session = Sessions(stub)
        reading = asyncio.create_task(session.read())
        await session.submit(1, NUM_STREAMS)
        await asyncio.sleep(2)
        used_s, tokens, deltas = processor_s(pid), session.num_tokens, session.num_deltas
        started = time.perf_counter()
        await asyncio.sleep(SECONDS)
        used_s, seconds = processor_s(pid) - used_s, time.perf_counter() - started
        tokens, deltas = session.num_tokens - tokens, session.num_deltas - deltas
        session.close()
        await asyncio.gather(reading, return_exceptions=True)
        await channel.close()
    _require_one_delta_a_token(tokens, deltas)
    emit(
        line(
            "gateway_session_cost_256_streams",
            used_s / tokens * 1e6,
            "us/token",
            MOST_US_PER_TOKEN,
            tokens_per_s=round(tokens / seconds),
            processor_percent=round(100 * used_s / seconds, 1),
        )
    )


async def calls_cost() -> None:
    async with gateway(CALLS_STEP_MS) as (address, pid):
        channel, stub = await stub_of(address)
        counts = [0] * NUM_STREAMS

        async def one(number: int) -> None:
            async for _ in stub.GenerateStream(request()):
                counts[number] += 1

        calls = [asyncio.create_task(one(number)) for number in range(NUM_STREAMS)]
        await asyncio.sleep(3)
        used_s, messages, started = processor_s(pid), sum(counts), time.perf_counter()
        await asyncio.sleep(SECONDS)
        used_s, messages = processor_s(pid) - used_s, sum(counts) - messages
        seconds = time.perf_counter() - started
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await channel.close()
    emit(
        line(
            "gateway_generate_stream_256_calls",
            messages / seconds,
            "messages/s",
            None,
            cost_us_per_message=round(used_s / messages * 1e6, 1),
            processor_percent=round(100 * used_s / seconds, 1),
        )
    )


async def long_prompts() -> None:
    """The longest pause of 32 streams, while prompts of 8k tokens arrive one after the other."""
    async with gateway(GAP_STEP_MS) as (address, _):
        channel, stub = await stub_of(address)
        text = " the" * LONG_TOKENS
        asked = await stub.Tokenize(pb.TokenizeRequest(text=text))
        session, prompts = Sessions(stub), Sessions(stub)
        readings = [asyncio.create_task(session.read()), asyncio.create_task(prompts.read())]
        await session.submit(1, 32)
        await asyncio.sleep(2)
        before = _gaps_ms(session)
        session.arrivals.clear()
        for number in range(1, NUM_LONG_PROMPTS + 1):
            await prompts.submit(number, 1, text)
            await asyncio.sleep(0.2)
            await prompts.cancel(number)
        gaps = _gaps_ms(session)
        session.close()
        prompts.close()
        await asyncio.gather(*readings, return_exceptions=True)
        await channel.close()
    emit(
        line(
            "gateway_worst_gap_8k_prompts",
            max(gaps),
            "ms",
            MOST_GAP_MS,
            step_ms=GAP_STEP_MS,
            prompt_tokens=len(asked.token_ids),
            prompts=NUM_LONG_PROMPTS,
            p99=round(statistics.quantiles(gaps, n=100)[-1], 2),
            worst_gap_without=round(max(before), 2),
        )
    )


def _gaps_ms(session: Sessions) -> list[float]:
    arrivals = session.arrivals[20:]
    return [(b - a) * 1000 for a, b in itertools.pairwise(arrivals)]


def _require_one_delta_a_token(tokens: int, deltas: int) -> None:
    if deltas < 0.99 * tokens:
        raise SystemExit(
            f"{tokens} tokens came in {deltas} deltas: the client or the machine was too slow, so "
            "the figure would be of merged deltas; run it on an idle machine"
        )


async def main() -> None:
    await session_cost()
    await calls_cost()
    await long_prompts()


if __name__ == "__main__":
    uvloop.run(main())
