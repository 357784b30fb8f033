"""`quire serve` over HTTP: its share of LLM.generate's tokens a second on the same work (see
bench/serve.py), and how much later than over gRPC the first token comes.

The client writes and reads sockets itself, so that little of the shared cores is its own.

python -m quire.bench.http
"""

import asyncio
import json
import statistics
import time
from urllib.parse import urlsplit

import grpc
from quire.protos.quire.v1 import inference_pb2 as pb
from quire.protos.quire.v1 import inference_pb2_grpc

from .report import emit, line
from .serve import NUM_STREAMS, OUTPUT_TOKENS, compare, flags_of_shape, prompts, server

LEAST_SHARE, MOST_ADDED_MS, NUM_FIRSTS = 0.85, 3.0, 60
_FLAGS = ("--port", "0")


class Connection:
    """Kept alive; one request after the other."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname, parts.port

    async def __aenter__(self) -> "Connection":
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def first_and_rest(self, ids: list[int], max_tokens: int) -> tuple[float, int]:
        """When the first event came, and how many of them had a text."""
        body = json.dumps(
            {
                "prompt": ids,
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "return_token_ids": True,
            }
        ).encode()
        self._writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
        head = await self._reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise SystemExit(f"the server answered {head!r}")
        first, num_tokens = 0.0, 0
        while size := int(await self._reader.readline(), 16):
            chunk = (await self._reader.readexactly(size + 2))[:-2]
            first = first or time.perf_counter()
            for event in chunk.split(b"\n\n"):
                if event.startswith(b"data: {"):
                    (choice,) = json.loads(event[6:])["choices"]
                    num_tokens += len(choice.get("token_ids") or ())
        await self._reader.readline()
        return first, num_tokens


async def served(url: str, run: int) -> float:
    """Output tokens a second, from the first request sent to the last answer's end."""

    async def one(ids: list[int]) -> int:
        async with Connection(url) as connection:
            return (await connection.first_and_rest(ids, OUTPUT_TOKENS))[1]

    started = time.perf_counter()
    num_tokens = sum(await asyncio.gather(*map(one, prompts(run))))
    seconds = time.perf_counter() - started
    if num_tokens != NUM_STREAMS * OUTPUT_TOKENS:
        raise SystemExit(f"{num_tokens} tokens came, not {NUM_STREAMS * OUTPUT_TOKENS}")
    return num_tokens / seconds


async def first_tokens(target: str, url: str) -> tuple[list[float], list[float]]:
    """Milliseconds to the first token over gRPC and over HTTP, in turn, of one prompt a time."""
    times: tuple[list[float], list[float]] = ([], [])
    params = pb.SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    async with grpc.aio.insecure_channel(target) as channel, Connection(url) as connection:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for number in range(NUM_FIRSTS + 5):  # the first ones warm up
            ids = prompts(number)[0]
            started = time.perf_counter()
            asked = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling_params=params)
            call = stub.GenerateStream(asked)
            await call.read()
            times[0].append((time.perf_counter() - started) * 1e3)
            while await call.read() is not grpc.aio.EOF:
                pass
            started = time.perf_counter()
            first, _ = await connection.first_and_rest(ids, 2)
            times[1].append((first - started) * 1e3)
    return times[0][5:], times[1][5:]


def main() -> None:
    with server("serve", *_FLAGS, "--no-enable-prefix-caching") as ((target, url), _):
        over_grpc, over_http = asyncio.run(first_tokens(target, url))
    added = [http - grpc_ms for grpc_ms, http in zip(over_grpc, over_http, strict=True)]
    emit(
        line(
            "http_added_time_to_first_token",
            statistics.median(added),
            "ms",
            MOST_ADDED_MS,
            over_grpc_ms=round(statistics.median(over_grpc), 2),
            over_http_ms=round(statistics.median(over_http), 2),
            requests=NUM_FIRSTS,
        )
    )
    with server("serve", *_FLAGS, *flags_of_shape()) as ((_, url), _):
        compare(
            "http_share_of_offline_32x128_128_135m",
            LEAST_SHARE,
            lambda run: asyncio.run(served(url, run)),
        )


if __name__ == "__main__":
    main()
