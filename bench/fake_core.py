"""A core that costs nothing: every open request gets one token a step, at a fixed pace.

Serves quire.core.v1 on a Unix socket for the gateway's bench: python -m quire.bench.fake_core
SOCKET STEP_MS. Ends with its standard input.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
from quire.engine.core_io import StepOutput
from quire.engine.request import FinishReason
from quire.protos.quire.core.v1 import core_pb2, core_pb2_grpc
from quire.serving.core_client.client import CHANNEL_OPTIONS
from quire.serving.core_client.wire import outputs_to_proto

MAX_MODEL_LEN, VOCAB = 16384, 1536
# Ordinary words of the embedded model's tokenizer: none is a special token.
_FIRST_ID, _NUM_IDS = 400, 800


class FakeCore(core_pb2_grpc.CoreServicer):
    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._left: dict[str, int] = {}
        self._is_new: set[str] = set()

    async def Run(self, requests: AsyncIterator[core_pb2.Commands], context: Any) -> None:
        self._left.clear()
        reading = asyncio.create_task(self._read(requests))
        loop = asyncio.get_running_loop()
        due, number = loop.time(), 0
        while not reading.done():
            due += self._step_s
            await asyncio.sleep(max(0, due - loop.time()))
            number += 1
            if outputs := self._outputs(_FIRST_ID + number % _NUM_IDS):
                await context.write(outputs_to_proto(outputs))

    async def GetStatus(self, *_: Any) -> core_pb2.GetStatusResponse:
        return core_pb2.GetStatusResponse(max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB)

    async def _read(self, requests: AsyncIterator[core_pb2.Commands]) -> None:
        async for commands in requests:
            for submit in commands.submits:
                self._left[submit.request_id] = submit.params.max_tokens
                self._is_new.add(submit.request_id)
            for request_id in commands.aborts:
                self._left.pop(request_id, None)

    def _outputs(self, token_id: int) -> list[StepOutput]:
        outputs = []
        for request_id, left in list(self._left.items()):
            reason = FinishReason.LENGTH if left == 1 else None
            queue_ns = 1000 if request_id in self._is_new else 0
            outputs.append(
                StepOutput(request_id, (token_id,), finish_reason=reason, queue_ns=queue_ns)
            )
            if left == 1:
                del self._left[request_id]
            else:
                self._left[request_id] = left - 1
        self._is_new.clear()
        return outputs


async def main(socket: str, step_ms: float) -> None:
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    core_pb2_grpc.add_CoreServicer_to_server(FakeCore(step_ms / 1000), server)
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
