"""What else the application runs on: a Unix socket, and another ASGI server."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from quire.engine.errors import ConfigError
from quire.engine.startup import Engine
from quire.serving.http_config import HttpConfig
from quire.serving.shim.engine import EngineAddress
from quire.serving.shim.process import ShimOptions, address_of, bound_socket, serve_http

from ..core.cores import WAIT_S
from ..gateway.gateways import Served, real_core, serve, until
from .shims import SUM

CHAT = "/v1/chat/completions"
ASKED = {"messages": SUM, "temperature": 0}


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short name, as sockets need."""
    path = Path(tempfile.mkdtemp(prefix="quire"))
    yield path
    shutil.rmtree(path)


def test_unix_socket_serves_and_goes_with_the_server(demo: Engine, folder: Path) -> None:
    path = folder / "http.sock"
    options_of = HttpConfig(uds=str(path))

    async def use(g: Served) -> None:
        options = ShimOptions("127.0.0.1", options_of, EngineAddress(g.address), is_local=False)
        stale = bound_socket(options)
        stale.close()  # nobody listens on it now
        listening = bound_socket(options)
        assert path.stat().st_mode & 0o777 == 0o660
        assert address_of(listening, "http") == f"unix:{path}"
        ready = asyncio.Event()
        serving = asyncio.create_task(serve_http(options, listening, lambda _: ready.set()))
        await ready.wait()
        with pytest.raises(ConfigError, match="Address already in use"):
            bound_socket(options)
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        async with httpx.AsyncClient(transport=transport, base_url="http://any") as client:
            answer = await client.post(CHAT, json=ASKED)
            assert "81" in answer.json()["choices"][0]["message"]["content"]
            # One that is told to stop makes room at once, and takes nothing of the next one's.
            long = {"prompt": "a", "max_tokens": 300, "ignore_eos": True, "stream": True}
            async with client.stream("POST", "/v1/completions", json=long) as answer:
                parts = answer.aiter_text()
                await anext(parts)
                os.kill(os.getpid(), signal.SIGTERM)
                await until(lambda: not path.exists())
                other = bound_socket(options)
                assert [part async for part in parts][-1].endswith("data: [DONE]\n\n")
        await serving
        assert path.is_socket()
        other.close()

    serve(real_core(demo), use, engine={"model": None})


def test_granian_runs_the_application(demo: Engine, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    async def use(g: Served) -> None:
        # In a folder that is no package: granian puts the names of those before the module's.
        environment = os.environ | {"QUIRE_ENGINE": g.address, "QUIRE_ALLOW_UNAUTHENTICATED": "1"}
        command = ["/bin/sh", "-c", 'cd "$0" && exec "$@"', str(folder)]
        command += [sys.executable, "-m", "granian", "--interface", "asgi", "--factory"]
        command += ["--host", "127.0.0.1", "--port", str(port), "quire.serving.shim.asgi:make"]
        # Spawned, not forked: JAX runs in this process.
        process = subprocess.Popen(command, env=environment, close_fds=False)
        try:
            url = f"http://127.0.0.1:{port}"
            async with httpx.AsyncClient(base_url=url, timeout=WAIT_S) as client:
                async with asyncio.timeout(WAIT_S):
                    while not await is_ready(client):
                        assert process.poll() is None, "granian ended"
                        await asyncio.sleep(0.05)
                whole = await client.post(CHAT, json=ASKED)
                assert "81" in whole.json()["choices"][0]["message"]["content"]
                streamed = await client.post(CHAT, json=ASKED | {"stream": True})
                assert streamed.text.endswith("data: [DONE]\n\n")
                long = {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}
                async with client.stream("POST", "/v1/completions", json=long) as answer:
                    async for _ in answer.aiter_bytes():
                        break
                await g.until_idle()  # who goes away ends his request
        finally:
            process.terminate()
            process.wait(WAIT_S)

    serve(real_core(demo), use, engine={"model": None})


async def is_ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/ready")).status_code == 200
    except httpx.TransportError:
        return False


def test_other_servers_need_a_key_or_the_users_word(monkeypatch: pytest.MonkeyPatch) -> None:
    from quire.serving.shim import asgi

    for name in ("QUIRE_ENGINE_API_KEY", "QUIRE_ALLOW_UNAUTHENTICATED"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="--allow-unauthenticated"):
        asgi.make()
    monkeypatch.setenv("QUIRE_ENGINE_API_KEY", "k")
    assert callable(asgi.make())
    monkeypatch.setenv("QUIRE_ENGINE_CA", "/nonexistent.pem")
    with pytest.raises(ConfigError, match=r"nonexistent\.pem. cannot be read"):
        asgi.make()


def test_other_server_is_told_that_the_start_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from quire.serving.shim import asgi

    ca = tmp_path / "ca.pem"
    ca.write_text("no certificate")
    monkeypatch.setenv("QUIRE_ENGINE_API_KEY", "k")
    monkeypatch.setenv("QUIRE_ENGINE_CA", str(ca))

    def broken(_: object) -> None:
        raise ValueError("no certificate")

    monkeypatch.setattr(asgi, "Engine", broken)
    sent = told(asgi.make(), "lifespan", "lifespan.startup")
    assert sent == [{"type": "lifespan.startup.failed", "message": "no certificate"}]


def test_other_server_is_told_to_close_websockets(monkeypatch: pytest.MonkeyPatch) -> None:
    from quire.serving.shim import asgi

    monkeypatch.setenv("QUIRE_ENGINE_API_KEY", "k")
    sent = told(asgi.make(), "websocket", "websocket.connect")
    assert sent == [{"type": "websocket.close"}]


def told(app: Any, scope: str, message: str) -> list[Any]:
    """What an application sends to a server that says one thing."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": message}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app({"type": scope}, receive, send))
    return sent
