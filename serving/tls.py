"""TLS from the server's options, for what is not gRPC; gRPC reads the same files itself."""

import ssl

from ..engine.errors import ConfigError
from .config import ServeConfig


def tls_context(config: ServeConfig) -> ssl.SSLContext | None:
    """For what is not gRPC; None without TLS. Raises ConfigError for files that cannot be used."""
    if config.ssl_certfile is None or config.ssl_keyfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password=_no_password)
        if config.ssl_ca_certs is not None:
            context.load_verify_locations(config.ssl_ca_certs)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"ssl_certfile, ssl_keyfile or ssl_ca_certs cannot be used ({error}); give PEM files, "
            "the key without a password"
        ) from error
    return context


def _no_password() -> str:
    raise ValueError("the key has a password")
