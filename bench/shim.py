"""What the HTTP front costs, behind a gateway that costs nothing.

The shim is a process of its own and its processor time is read from the system, so neither the
client nor the fake gateway counts. One server-sent event per token and stream: the client checks.

python -m quire.bench.shim
"""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import uvloop
from quire.serving.supervisor.child import Child, Process

from .gateway import processor_s
from .report import emit, line

NUM_STREAMS, STEP_MS, SECONDS = 256, 25.0, 10.0
MOST_US_PER_TOKEN = 20

_BODY = json.dumps(
    {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
).encode()
_REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    b"content-length: " + str(len(_BODY)).encode() + b"\r\n\r\n" + _BODY
)


class Reader(asyncio.Protocol):
    """One stream: counts events and the pieces in which they came."""

    def __init__(self) -> None:
        self.num_events = 0
        self.num_pieces = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        transport.write(_REQUEST)

    def data_received(self, data: bytes) -> None:
        self.num_pieces += 1
        self.num_events += data.count(b"data: ")


async def main() -> None:
    loop = asyncio.get_running_loop()
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "gateway.sock"
        fake = subprocess.Popen(
            [sys.executable, "-m", "quire.bench.fake_gateway", str(socket), str(STEP_MS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert fake.stdout is not None
        fake.stdout.readline()
        options = {
            "http": {"port": 0},
            "serve": {"log_level": "warning"},
            "front_socket": str(socket),
            "ping_socket": str(Path(folder) / "ping.sock"),
            "secret": "00" * 32,
        }
        command = (sys.executable, "-P", "-m", "quire.serving.shim")
        process = await Process.start(Child("shim", command, options))
        async for message in process.messages():
            if message["event"] == "ready":
                break
        port = int(message["address"].rpartition(":")[2])
        readers = [
            (await loop.create_connection(Reader, "127.0.0.1", port))[1] for _ in range(NUM_STREAMS)
        ]
        await asyncio.sleep(3)
        events, pieces = sum(r.num_events for r in readers), sum(r.num_pieces for r in readers)
        used_s, started = processor_s(process.pid), time.perf_counter()
        await asyncio.sleep(SECONDS)
        used_s, seconds = processor_s(process.pid) - used_s, time.perf_counter() - started
        events = sum(r.num_events for r in readers) - events
        pieces = sum(r.num_pieces for r in readers) - pieces
        for reader in readers:
            reader.transport.close()
        process.close()
        await process.wait()
        fake.communicate()
    if pieces < 0.99 * events:
        raise SystemExit(
            f"{events} events came in {pieces} pieces: the machine was too slow, so the figure "
            "would be of merged events; run it on an idle machine"
        )
    emit(
        line(
            "shim_stream_cost_256_streams",
            used_s / events * 1e6,
            "us/token",
            MOST_US_PER_TOKEN,
            tokens_per_s=round(events / seconds),
            processor_percent=round(100 * used_s / seconds, 1),
        )
    )


if __name__ == "__main__":
    uvloop.run(main())
