"""Every option of the HTTP front, once."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..engine.errors import ConfigError
from .config import check_port, check_types, option


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """What the user asked for of the OpenAI-compatible server."""

    port: int = option(8000, "port of the HTTP server; 0 takes a free one", metavar="PORT")
    api_server_count: int = option(1, "processes that speak HTTP, on one port", metavar="PROCESSES")
    uds: str | None = option(
        None, "Unix socket to listen on instead of host and port", metavar="PATH"
    )
    allowed_origins: tuple[str, ...] = option(
        (),
        "origins whose web pages may call the server, like https://example.com; * is any",
        metavar="ORIGIN",
    )
    root_path: str = option(
        "", "path under which a proxy serves this, if it does not take it off", metavar="PATH"
    )
    response_role: str = option("assistant", "role of the answers to conversations")
    unknown_fields: Literal["refuse", "warn"] = option(
        "refuse", "fields of a request that nobody knows: an error, or a line in the log"
    )

    def __post_init__(self) -> None:
        check_types(self)
        check_port("port", self.port)
        self._check_pages()
        if self.uds is not None and self.api_server_count > 1:
            raise ConfigError(
                "one process listens on a Unix socket; leave out uds, or api_server_count"
            )
        if self.api_server_count < 1:
            raise ConfigError(f"api_server_count must be at least 1, got {self.api_server_count}")
        if self.api_server_count > 1 and self.port == 0:
            raise ConfigError(
                "several processes share one port, so port must not be 0 with api_server_count "
                f"{self.api_server_count}; choose a port"
            )

    def _check_pages(self) -> None:
        text = ",".join(self.allowed_origins)
        if text.startswith("["):  # vLLM's flag takes a JSON list
            object.__setattr__(self, "allowed_origins", _from_json(text))
        origins = []
        for given in self.allowed_origins:
            origin = _as_browsers_write(given)
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"allowed_origins has {given!r}, but an origin is a scheme, a host and perhaps "
                    "a port, like https://example.com:8443, and * alone is any"
                )
            origins.append(origin)
        object.__setattr__(self, "allowed_origins", tuple(origins))
        if self.uds is not None:
            if not self.uds or "\0" in self.uds:
                raise ConfigError(f"uds must be the path of a socket, got {self.uds!r}")
            object.__setattr__(self, "uds", str(Path(self.uds).expanduser()))
        if self.root_path and not _ROOT.fullmatch(self.root_path):
            raise ConfigError(
                f"root_path must begin with / and not end with one, got {self.root_path!r}"
            )
        if not self.response_role:
            raise ConfigError("response_role must not be empty; leave it out for assistant")


ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s*@:]+(:[0-9]+)?|[a-z]+://\[[0-9a-f:.]+\](:[0-9]+)?")
_USUAL_PORTS = (("http://", ":80"), ("https://", ":443"))
_ROOT = re.compile(r"(/[^/\s]+)+")


def _as_browsers_write(origin: str) -> str:
    origin = origin.lower().removesuffix("/")
    for scheme, port in _USUAL_PORTS:
        if origin.startswith(scheme):
            return origin.removesuffix(port)
    return origin


def _from_json(text: str) -> tuple[str, ...]:
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise ConfigError(f"allowed_origins must be origins or a JSON list of them, got {text!r}")
    return tuple(values)


@dataclass(frozen=True, kw_only=True)
class LinkConfig:
    """Which engine a shim of its own is in front of."""

    engine: str = option("127.0.0.1:50051", "gRPC address of the engine", metavar="HOST:PORT")
    engine_api_key: str | None = option(
        None,
        "key that this shim shows to the engine; callers still show theirs",
        metavar="KEY",
        is_secret=True,
    )
    engine_ca: str | None = option(
        None, "authorities of the engine's certificate, PEM; turns TLS on", metavar="FILE"
    )

    def __post_init__(self) -> None:
        check_types(self)
        if self.engine_ca is not None:
            path = Path(self.engine_ca).expanduser()
            try:
                path.read_bytes()
            except OSError as error:
                raise ConfigError(
                    f"engine_ca {self.engine_ca!r} cannot be read ({error.strerror}); give a PEM "
                    "file that this user can read"
                ) from error
            object.__setattr__(self, "engine_ca", str(path))
        if self.engine_api_key is not None and not isinstance(self.engine_api_key, str):
            raise ConfigError("engine_api_key must be text")
