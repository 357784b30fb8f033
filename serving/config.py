"""Every server option, once: name, default, unit, help. Flags, variables and docs are generated
from here, as the engine's are from engine/config.py.

The config holds what was asked. Keys that lie in a file are read by read_keys(); whether the
address may be served with them is check_bind()'s.
"""

import ipaddress
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from ..engine.config import checked
from ..engine.errors import ConfigError

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

_MAX_PORT = 65535


def option(
    default: Any,
    help: str,
    *,
    metavar: str | None = None,
    is_secret: bool = False,
    fallback: str | None = None,
) -> Any:
    """A field of the config. is_secret: its value is shown nowhere and is not split at commas.
    fallback: another variable, read when neither the flag nor QUIRE_<NAME> is there.
    """
    return field(
        default=default,
        repr=not is_secret,
        metadata={
            "help": help,
            "metavar": metavar,
            "is_secret": is_secret,
            "fallback": fallback,
            "unset": "none",
        },
    )


def check_types(config: Any) -> None:
    """Bring the fields of a config, but for secrets, to their types. Raises ConfigError."""
    hints = get_type_hints(type(config))
    for f in fields(config):
        if not f.metadata["is_secret"]:
            value = checked(f.name, getattr(config, f.name), hints[f.name])
            object.__setattr__(config, f.name, value)


def check_port(name: str, port: int | None) -> None:
    """Raises ConfigError."""
    if port is not None and not 0 <= port <= _MAX_PORT:
        raise ConfigError(f"{name} must be 0 (any free one) to {_MAX_PORT}, got {port}")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What the user asked for of the server in front of the engine."""

    host: str = option(
        "127.0.0.1",
        "address to listen on; one that others can reach needs a key",
        metavar="ADDRESS",
    )
    grpc_port: int = option(50051, "port of the gRPC server; 0 takes a free one", metavar="PORT")
    served_model_name: tuple[str, ...] = option(
        (),
        "names that requests may use, repeated or comma separated; by default the model's as given",
        metavar="NAME",
    )
    api_key: tuple[str, ...] = option(
        (),
        "key that callers must show; repeatable. Other users of this machine can read flags: "
        "QUIRE_API_KEY (or VLLM_API_KEY) and the file are safer",
        metavar="KEY",
        is_secret=True,
        fallback="VLLM_API_KEY",
    )
    api_key_file: str | None = option(
        None,
        "file of more keys, one a line; blank lines and # comments are skipped",
        metavar="FILE",
    )
    allow_unauthenticated: bool = option(
        False, "serve an address that others can reach without a key"
    )
    ssl_certfile: str | None = option(
        None, "certificate chain of the server, PEM; turns TLS on", metavar="FILE"
    )
    ssl_keyfile: str | None = option(None, "private key of ssl_certfile, PEM", metavar="FILE")
    ssl_ca_certs: str | None = option(
        None, "authorities, PEM: clients must show a certificate of one of them", metavar="FILE"
    )
    max_num_queued_reqs: int = option(
        1024, "requests that wait for their first token; more are refused", metavar="REQUESTS"
    )
    max_num_queued_tokens: int = option(
        1_000_000, "prompt tokens of the waiting requests; more are refused", metavar="TOKENS"
    )
    step_timeout: float = option(
        30.0,
        "a core whose step takes longer, or that does not answer, is replaced",
        metavar="SECONDS",
    )
    drain_timeout: float = option(
        30.0, "what open requests get to finish after a signal to stop", metavar="SECONDS"
    )
    metrics_port: int | None = option(
        None, "port of GET /metrics over HTTP, on the same host; 0 takes a free one", metavar="PORT"
    )
    log_level: LogLevel = option(
        "info", "what is worth a line in the log", fallback="VLLM_LOGGING_LEVEL"
    )
    log_format: LogFormat = option("text", "lines for people, or one JSON object a line")
    enable_log_requests: bool = option(False, "a line for each request")
    max_log_len: int = option(
        0, "characters of a prompt in the log of requests; 0 logs none", metavar="CHARACTERS"
    )

    def __post_init__(self) -> None:
        check_types(self)
        object.__setattr__(self, "api_key", _checked_keys(self.api_key))
        self._check_addresses()
        self._check_tls()
        for name, lowest in _LOWEST.items():
            if getattr(self, name) < lowest:
                raise ConfigError(f"{name} must be at least {lowest}, got {getattr(self, name)}")
        if not 0 < self.step_timeout < math.inf:
            raise ConfigError(
                f"step_timeout must be a finite number of seconds above 0, got {self.step_timeout}"
            )
        if not 0 <= self.drain_timeout < math.inf:
            raise ConfigError(
                "drain_timeout must be a finite number of seconds, 0 or more, got "
                f"{self.drain_timeout}"
            )

    def _check_addresses(self) -> None:
        if not _is_host(self.host):
            raise ConfigError(
                "host must be a name, or an address without brackets and port, got "
                f"{self.host!r}; the port is grpc_port"
            )
        for name in ("grpc_port", "metrics_port"):
            check_port(name, getattr(self, name))
        if self.metrics_port and self.metrics_port == self.grpc_port:
            raise ConfigError(
                f"metrics_port and grpc_port must differ, both are {self.grpc_port}; choose another"
            )
        if "" in self.served_model_name:
            raise ConfigError("served_model_name must not be empty; leave it out for the model's")

    def _check_tls(self) -> None:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            given = "ssl_certfile" if self.ssl_certfile is not None else "ssl_keyfile"
            missing = "ssl_keyfile" if self.ssl_certfile is not None else "ssl_certfile"
            raise ConfigError(f"{given} goes with {missing}; give both for TLS, or neither")
        if self.ssl_ca_certs is not None and self.ssl_certfile is None:
            raise ConfigError(
                "ssl_ca_certs goes with TLS; give ssl_certfile and ssl_keyfile too, or leave it out"
            )


_LOWEST = {"max_num_queued_reqs": 1, "max_num_queued_tokens": 1, "max_log_len": 0}


def read_keys(config: ServeConfig) -> tuple[str, ...]:
    """Every key that callers may show: those of the option and of the file, each once.

    Raises ConfigError when the file cannot be read or has none.
    """
    if config.api_key_file is None:
        return tuple(dict.fromkeys(config.api_key))
    where = f"api_key_file {config.api_key_file!r}"
    try:
        text = Path(config.api_key_file).expanduser().read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"{where} cannot be read ({error.strerror}); give a file that this user can read"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not text; it holds one key a line") from error
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        key = line.strip()
        if key and not key.startswith("#"):
            if not _is_key(key):
                raise ConfigError(f"line {number} of {where}: {_KEY_RULE}")
            keys.append(key)
    if not keys:
        raise ConfigError(f"{where} has no key; write one a line, or leave the option out")
    return tuple(dict.fromkeys((*config.api_key, *keys)))


def check_bind(config: ServeConfig, keys: tuple[str, ...]) -> None:
    """Raises ConfigError when everybody who can reach the address could use it."""
    if keys or config.allow_unauthenticated or _is_loopback(config.host):
        return
    raise ConfigError(
        f"host {config.host} can be reached by others and there is no key; give one with "
        "QUIRE_API_KEY, --api-key-file or --api-key, or allow everybody with "
        "--allow-unauthenticated"
    )


def _is_host(host: str) -> bool:
    """Whether it may be one: a name server is not asked."""
    if ":" not in host:
        return host != "" and host.isprintable() and not set(host) & set(" /[]")
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    """Only what is so without asking a name server."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


_KEY_RULE = "a key is one or more ASCII characters without spaces"


def _is_key(key: Any) -> bool:
    is_text = isinstance(key, str) and key != ""
    return is_text and key.isascii() and key.isprintable() and " " not in key


def _checked_keys(keys: Any) -> tuple[str, ...]:
    """As checked(), but no message shows a key."""
    if not isinstance(keys, list | tuple):
        raise ConfigError(f"api_key must be a list of str, got a {type(keys).__name__}")
    for number, key in enumerate(keys, 1):
        if key == "":
            raise ConfigError(
                "api_key must not be empty; for none leave out the flag and the variables "
                "QUIRE_API_KEY and VLLM_API_KEY"
            )
        if not _is_key(key):
            raise ConfigError(f"api_key {number} of {len(keys)}: {_KEY_RULE}; choose another")
    return tuple(keys)
