"""Which web pages may call the server, and under which names and paths it answers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from quire.engine.errors import ConfigError
from quire.engine.startup import Engine
from quire.serving.config import ServeConfig
from quire.serving.http_config import HttpConfig
from quire.serving.shim.absent import why_absent
from quire.serving.shim.process import serves_only_here

from ..gateway.gateways import real_core
from .shims import Front, front_stage

PAGE = "https://app.example"
MODELS = "/v1/models"


@contextmanager
def stage(demo: Engine, *, is_local: bool = False, **http: Any) -> Iterator[Callable[..., Any]]:
    config = HttpConfig(port=0, **http)
    options = {"http": config, "is_local": is_local, "engine": {"model": None}}
    with front_stage(real_core(demo), **options) as run:
        yield run


@pytest.fixture(scope="module")
def local(demo: Engine) -> Iterator[Callable[..., Any]]:
    """Without keys, and for this machine."""
    with stage(demo, is_local=True) as run:
        yield run


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "model.localhost"}, 200),
        ({"host": "127.0.0.2"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "evil.example:8000"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "10.0.0.7"}, 200),  # a page can let a name point here, not an address
        ({"host": "0.0.0.0:8000"}, 200),
        ({"host": "localhost."}, 200),
        ({"host": "LOCALHOST", "origin": "http://localhost"}, 200),
        ({"origin": "http://["}, 403),
        ({"origin": ""}, 403),
        ({"host": "[::1"}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:3000"}, 403),
        ({"origin": PAGE}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_pages_from_elsewhere_cannot_use_a_server_without_keys(
    local: Callable[..., Any], headers: dict[str, str], status: int
) -> None:
    async def use(front: Front) -> None:
        for path in (MODELS, "/", "/health", "/v1/nothing"):
            answer = await front.http.get(path, headers=headers)
            expected = 404 if status == 200 and path == "/v1/nothing" else status
            assert answer.status_code == expected, (path, answer.text)
        if status == 403:
            assert answer.json()["error"]["type"] == "permission_error"
            assert "access-control-allow-origin" not in answer.headers

    local(use)


def test_others_are_let_in_where_the_user_says_so(demo: Engine) -> None:
    async def use(front: Front) -> None:
        asks = {
            "origin": PAGE,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,x-stainless-lang",
        }
        preflight = await front.http.options("/v1/chat/completions", headers=asks)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == PAGE
        answer = await front.http.get(MODELS, headers={"origin": PAGE, "host": "app.example"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        other = await front.http.get(MODELS, headers={"origin": "https://other.example"})
        assert other.status_code == 403
        streamed = await front.http.post(
            "/v1/completions",
            json={"prompt": "a", "max_tokens": 2, "stream": True},
            headers={"origin": PAGE},
        )
        assert streamed.headers["access-control-allow-origin"] == PAGE
        assert streamed.text.endswith("data: [DONE]\n\n")

    with stage(demo, is_local=True, allowed_origins=(PAGE,)) as run:
        run(use)


def test_any_page_may_call_where_the_user_says_so(demo: Engine) -> None:
    async def use(front: Front) -> None:
        answer = await front.http.get(MODELS, headers={"origin": PAGE, "host": "evil.example"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "*"

    with stage(demo, is_local=True, allowed_origins=("*",)) as run:
        run(use)


def test_no_page_may_read_what_others_are_told_by_default(demo: Engine) -> None:
    """With keys a page that has one may call; what it may read is the browser's rule."""

    async def use(front: Front) -> None:
        answer = await front.http.get(MODELS, headers={"origin": PAGE, "host": "evil.example"})
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers

    with stage(demo) as run:
        run(use)


def test_path_of_a_proxy_is_taken_off_and_roles_are_named(demo: Engine) -> None:
    async def use(front: Front) -> None:
        for path in ("/llm/v1/models", "/v1/models", "/llm/", "/llm", "/llm/health"):
            assert (await front.http.get(path)).status_code == 200
        absent = await front.http.get("/llm/v1/embeddings")
        assert absent.json()["error"]["code"] == "unsupported_route"
        assert (await front.http.get("/llmv1/models")).status_code == 404
        whole = (await front.chat(max_tokens=2)).json()
        assert whole["choices"][0]["message"]["role"] == "bot"
        streamed = await front.chat(max_tokens=2, stream=True)
        assert '"role":"bot"' in streamed.text

    with stage(demo, root_path="/llm", response_role="bot") as run:
        run(use)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/v1/embeddings", "embeddings"),
        ("/api/chat", "Ollama"),
        ("/generate", "TGI"),
        ("/completion", "llama-server"),
        ("/v1/audio/speech", "audio"),
        ("/v1/responses", "Responses"),
        ("/rerank/", "embeddings"),
    ],
)
def test_routes_of_others_say_why_they_are_not_here(
    local: Callable[..., Any], path: str, why: str
) -> None:
    async def use(front: Front) -> None:
        answer = await front.http.post(path, json={})
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert error["code"] == "unsupported_route"
        assert why in error["message"]

    local(use)


def test_paths_that_nobody_has_are_just_unknown() -> None:
    for path in ("/", "/v1", "/v1/embedding", "/apis", "/generated"):
        assert why_absent(path) is None


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (("*",), ("*",)),
        (('["*"]',), ("*",)),
        (('["https://a.b"', '"http://c:1"]'), ("https://a.b", "http://c:1")),
        (("https://Example.com:443", "http://a:80/"), ("https://example.com", "http://a")),
        (("http://[::1]:3000", "tauri://localhost"), ("http://[::1]:3000", "tauri://localhost")),
    ],
)
def test_origins_may_be_a_json_list(given: tuple[str, ...], kept: tuple[str, ...]) -> None:
    assert HttpConfig(allowed_origins=given).allowed_origins == kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allowed_origins": ("example.com",)}, "an origin is a scheme"),
        ({"allowed_origins": ("https://a/b",)}, "an origin is a scheme"),
        ({"allowed_origins": ("https://*.example.com",)}, "an origin is a scheme"),
        ({"allowed_origins": ("https://user@a",)}, "an origin is a scheme"),
        ({"allowed_origins": ("https://:5",)}, "an origin is a scheme"),
        ({"allowed_origins": ("null",)}, "an origin is a scheme"),
        ({"uds": "a\0b"}, "the path of a socket"),
        ({"allowed_origins": ("[1]",)}, "a JSON list of them"),
        ({"root_path": "llm"}, "must begin with /"),
        ({"root_path": "/"}, "must begin with /"),
        ({"response_role": ""}, "must not be empty"),
        ({"uds": "/tmp/x", "api_server_count": 2, "port": 1}, "one process listens"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HttpConfig(**options)


@pytest.mark.parametrize(
    ("serve", "http", "key", "is_local"),
    [
        ({}, {}, None, True),
        ({}, {}, "sesame", False),
        ({}, {"uds": "/run/http.sock"}, None, False),
        ({"allow_unauthenticated": True}, {}, None, False),
    ],
    ids=["default", "key", "socket", "everybody"],
)
def test_server_is_closed_to_pages_unless_others_are_meant_to_use_it(
    serve: dict[str, Any], http: dict[str, Any], key: str | None, is_local: bool
) -> None:
    assert serves_only_here(ServeConfig(**serve), HttpConfig(**http), key) is is_local
