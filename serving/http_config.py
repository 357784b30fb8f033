"""Every option of the HTTP front, once."""

from dataclasses import dataclass
from typing import Literal

from ..engine.errors import ConfigError
from .config import check_port, check_types, option


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """What the user asked for of the OpenAI-compatible server."""

    port: int = option(8000, "port of the HTTP server; 0 takes a free one", metavar="PORT")
    api_server_count: int = option(1, "processes that speak HTTP, on one port", metavar="PROCESSES")
    unknown_fields: Literal["refuse", "warn"] = option(
        "refuse", "fields of a request that nobody knows: an error, or a line in the log"
    )

    def __post_init__(self) -> None:
        check_types(self)
        check_port("port", self.port)
        if self.api_server_count < 1:
            raise ConfigError(f"api_server_count must be at least 1, got {self.api_server_count}")
        if self.api_server_count > 1 and self.port == 0:
            raise ConfigError(
                "several processes share one port, so port must not be 0 with api_server_count "
                f"{self.api_server_count}; choose a port"
            )


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
        if self.engine_api_key is not None and not isinstance(self.engine_api_key, str):
            raise ConfigError("engine_api_key must be text")
