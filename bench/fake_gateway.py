"""A gateway that costs nothing: every open request gets one word a step, at a fixed pace.

Serves quire.v1's Session on a Unix socket for the shim's bench: python -m quire.bench.fake_gateway
SOCKET STEP_MS. Ends with its standard input.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from quire.protos.quire.v1 import inference_pb2 as pb
from quire.protos.quire.v1 import inference_pb2_grpc


class FakeGateway(inference_pb2_grpc.InferenceServicer):
    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    async def Session(self, requests: AsyncIterator[pb.SessionRequest], context: Any) -> None:
        await context.send_initial_metadata(())
        open_ids: set[int] = set()
        reading = asyncio.create_task(_read(requests, open_ids))
        loop = asyncio.get_running_loop()
        due, number = loop.time(), 0
        while not reading.done():
            due += self._step_s
            await asyncio.sleep(max(0, due - loop.time()))
            number += 1
            message = pb.SessionResponse()
            for session_id in open_ids:
                event = message.events.add()
                event.id = session_id
                event.delta.text = f" word{number % 100}"
                event.delta.token_ids.append(number % 1000)
            if message.events:
                await context.write(message)


async def _read(requests: AsyncIterator[pb.SessionRequest], open_ids: set[int]) -> None:
    async for message in requests:
        if message.HasField("submit"):
            open_ids.add(message.submit.id)
        else:
            open_ids.discard(message.cancel.id)


async def main(socket: str, step_ms: float) -> None:
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(FakeGateway(step_ms / 1000), server)
    health = health_aio.HealthServicer()
    await health.set("quire.v1.Inference", 1)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    print("ready", flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    await reader.read()
    await server.stop(None)


if __name__ == "__main__":
    import uvloop

    uvloop.run(main(sys.argv[1], float(sys.argv[2])))
