"""Who may talk to `quire serve` when it asks for certificates and keys."""

import asyncio
import ssl
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from ..gateway.certificates import KEY, Files
from ..gateway.engines import WAIT_S, Client, Engine, free_port
from .servers import COMPLETIONS, body


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files.make(tmp_path_factory.mktemp("tls"))


class Server:
    """With keys, and certificates on both sides."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.port = free_port()
        given = ("--port", str(self.port), *files.flags())
        self.engine = Engine(*given, verb="serve", connect=files.connect)

    def client(self, trusts: str, shows: str | None, key: str | None = KEY) -> httpx.AsyncClient:
        context = ssl.create_default_context(cafile=self.files.path(trusts, "pem"))
        if shows is not None:
            context.load_cert_chain(self.files.path(shows, "pem"), self.files.path(shows, "key"))
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        url = f"https://127.0.0.1:{self.port}"
        return httpx.AsyncClient(
            base_url=url, verify=context, headers=headers, timeout=WAIT_S, trust_env=False
        )


@pytest.fixture(scope="module")
def server(files: Files) -> Iterator[Server]:
    made = Server(files)
    with made.engine:
        yield made


def test_wrong_certificates_and_keys_get_nothing_and_disturb_nobody(server: Server) -> None:
    async def answer(client: httpx.AsyncClient, **fields: Any) -> Any:
        got = await client.post(COMPLETIONS, json=body(**fields))
        assert got.status_code == 200, got.text
        return got.json()["choices"]

    async def use(_: Client) -> None:
        async with server.client("ours", "ours-client") as client:
            before = await answer(client)
            long = asyncio.create_task(answer(client, max_tokens=300))
            for trusts, shows in (
                ("other", "ours-client"),  # it is not who the client takes it for
                ("ours", None),
                ("ours", "other-client"),
            ):
                async with server.client(trusts, shows) as stranger:
                    with pytest.raises(httpx.TransportError):
                        await stranger.get("/health")
            plain = f"http://127.0.0.1:{server.port}"
            async with httpx.AsyncClient(base_url=plain, trust_env=False) as stranger:
                with pytest.raises(httpx.TransportError):
                    await stranger.get("/health")
            for key in (None, "wrong", KEY[:-1], KEY + "e"):
                async with server.client("ours", "ours-client", key) as stranger:
                    refused = await stranger.post(COMPLETIONS, json=body())
                    assert refused.status_code == 401
                    assert refused.json()["error"]["code"] == "invalid_api_key"
                    assert refused.headers["www-authenticate"] == "Bearer"
                    assert (await stranger.get("/health")).status_code == 200
            assert len((await long)[0]["text"]) > 100
            assert await answer(client) == before

    server.engine.run(use)
