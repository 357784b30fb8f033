"""`quire serve` as processes for tests: clients of its HTTP that read, break off or do not read."""

import asyncio
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import httpx

from ..gateway.engines import WAIT_S, Client, Engine, free_port, until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_EOS = "2"  # of the embedded model


def body(prompt: Any = "Once upon a time", **fields: Any) -> dict[str, Any]:
    """Of a known length and an answer that does not repeat itself: hot, and without an end."""
    hot = {"temperature": 1.6, "seed": 7, "max_tokens": 48, "logit_bias": {_EOS: -100}}
    return {"prompt": prompt} | hot | fields


def chat_body(text: str = "What is 23 + 58?", **fields: Any) -> dict[str, Any]:
    made = body(**fields)
    del made["prompt"]
    return made | {"messages": [{"role": "user", "content": text}]}


@dataclass
class Choice:
    text: str = ""
    tokens: list[str] = field(default_factory=list)  # of the logprobs
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, part: dict[str, Any]) -> None:
        said = part.get("delta", part.get("message"))
        self.text += part["text"] if said is None else said.get("content") or ""
        logprobs = part["logprobs"] or {}
        content = logprobs.get("content") or ()
        self.tokens += logprobs.get("tokens") or [one["token"] for one in content]
        self.logprobs += logprobs.get("token_logprobs") or [one["logprob"] for one in content]
        self.finish_reason = part["finish_reason"]


@dataclass
class Heard:
    """What came of one call; equal to another with the same choices and the same end."""

    choices: dict[int, Choice] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    status: int = 0
    headers: httpx.Headers = field(default_factory=httpx.Headers, compare=False)
    num_events: int = field(default=0, compare=False)
    is_done: bool = field(default=True, compare=False)  # a stream: [DONE] has come

    def add(self, payload: dict[str, Any]) -> None:
        self.num_events += 1
        self.error = payload.get("error", self.error)
        for part in payload.get("choices", ()):
            self.choices.setdefault(part["index"], Choice()).add(part)


class Web:
    """A client of a server's HTTP, and of its gRPC for how it is inside."""

    def __init__(self, http: httpx.AsyncClient, grpc: Client) -> None:
        self.http = http
        self.grpc = grpc

    async def whole(self, asked: dict[str, Any]) -> Heard:
        answer = await self.http.post(_path(asked), json=asked)
        heard = Heard(status=answer.status_code, headers=answer.headers)
        heard.add(answer.json())
        return heard

    async def stream(self, asked: dict[str, Any], heard: Heard | None = None) -> Heard:
        """heard: to be filled, for whoever wants to see how far it is. Raises httpx.HTTPError when
        the connection ends before the answer.
        """
        heard = Heard() if heard is None else heard
        asked = asked | {"stream": True}
        async with self.http.stream("POST", _path(asked), json=asked) as answer:
            heard.status, heard.headers = answer.status_code, answer.headers
            if answer.status_code != 200:
                heard.add(json.loads(await answer.aread()))
                return heard
            heard.is_done = False
            async for line in answer.aiter_lines():
                assert not heard.is_done or not line, line
                if line == "data: [DONE]":
                    heard.is_done = True
                elif line:
                    assert line.startswith("data: "), line
                    heard.add(json.loads(line.removeprefix("data: ")))
        return heard

    async def health(self) -> int:
        """The status; 0 without an answer."""
        try:
            return (await self.http.get("/health", headers={"connection": "close"})).status_code
        except httpx.TransportError:
            return 0

    async def until_health(self, status: int) -> None:
        async def is_so() -> bool:
            return await self.health() == status

        await until(is_so)

    async def until_free(self) -> None:
        """Nothing is open and every page is free."""
        await self.grpc.until_metrics(
            lambda m: (
                not m["quire_requests_open"] and m["quire_kv_pages_free"] == m["quire_kv_pages"]
            )
        )


def _path(asked: dict[str, Any]) -> str:
    return CHAT if "messages" in asked else COMPLETIONS


async def until_events(num_events: int, *several: Heard) -> None:
    """Each has come so far."""

    async def are_there() -> bool:
        return all(one.num_events >= num_events for one in several)

    await until(are_there)


class Server:
    """`quire serve` on a port that stays the same; leaving the `with` kills what is left of it."""

    def __init__(self, *flags: str, port: int | None = None, grpc_port: int | None = None) -> None:
        self.port = free_port() if port is None else port
        grpc_port = free_port() if grpc_port is None else grpc_port
        self.engine = Engine("--port", f"{self.port}", *flags, verb="serve", port=grpc_port)
        self._expected: Heard | None = None

    def __enter__(self) -> "Server":
        self.engine.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.engine.__exit__(kind, error, trace)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def http(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self.url, timeout=WAIT_S, trust_env=False, limits=limits)

    def run(self, use: Callable[[Web], Awaitable[Any]]) -> None:
        """What clients do, and harm that is done meanwhile. The server must stand it: the same
        supervisor, health 200, nothing held, and the answers of before, over HTTP as over gRPC.
        """

        async def used(client: Client) -> None:
            async with self.http() as http:
                if self._expected is None:
                    self._expected = await Web(http, client).whole(body())
                    assert self._expected.status == 200, self._expected
                await use(Web(http, client))
            async with self.http() as http:
                web = Web(http, client)
                await web.until_health(200)
                assert await web.stream(body()) == self._expected
                await web.until_free()

        self.engine.run(used)


class Raw:
    """One connection whose bytes a test says itself. Make it with open()."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, port: int, *, receive_bytes: int | None = None) -> "Raw":
        """receive_bytes: what the kernel keeps for a reader that does not read."""
        sock = socket.socket()
        if receive_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        return cls(*await asyncio.open_connection(sock=sock))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def rest(self) -> bytes:
        """What comes until the connection ends, however it does."""
        parts = []
        try:
            while part := await self.reader.read(1 << 16):
                parts.append(part)
        except ConnectionResetError:
            pass
        return b"".join(parts)

    def end(self) -> None:
        """FIN, and a reset for what comes after it."""
        self.writer.close()

    def reset(self) -> None:
        """Closed with something to linger for and no time, the kernel sends a reset."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


def request_bytes(asked: dict[str, Any]) -> bytes:
    """A whole request, as it is on the wire, and the only one of its connection."""
    content = json.dumps(asked).encode()
    head = f"POST {_path(asked)} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    head += "content-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content
