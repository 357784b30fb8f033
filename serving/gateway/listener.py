"""The public gRPC server: its address, TLS, keys, limits, and the services behind it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ...engine.errors import AuthenticationError, ConfigError
from ...protos.quire.v1 import inference_pb2, inference_pb2_grpc
from ..config import ServeConfig
from ..tls import tls_context
from .callers import Callers
from .decoding import DecodingInterceptor
from .health import Health
from .service import InferenceService
from .statuses import abort

MAX_MESSAGE_BYTES = 32 << 20
MAX_METADATA_BYTES = 64 << 10
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),  # an answer is as long as it was asked for
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    # Two servers on one port would each get some of the calls.
    ("grpc.so_reuseport", 0),
    # A client that vanished without a word is noticed, and its requests end.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)
_WITHOUT_KEY = f"/{health_pb2.DESCRIPTOR.services_by_name['Health'].full_name}/"


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """Lets nobody in without a key, but those who ask for health."""

    def __init__(self, callers: Callers, on_refused: Callable[[], None]) -> None:
        self._callers = callers
        self._on_refused = on_refused

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        if not details.method.startswith(_WITHOUT_KEY):
            try:
                self._callers.of_metadata(details.invocation_metadata)
            except AuthenticationError as error:
                self._on_refused()
                return _refusal(error)
        return await continuation(details)


def _refusal(error: AuthenticationError) -> Any:
    async def refuse(_: Any, context: Any) -> None:
        await abort(context, error)

    # Of this kind, it does not wait for a message that may never come.
    return grpc.stream_stream_rpc_method_handler(refuse)


def make_listener(
    config: ServeConfig, service: InferenceService, health: Health, keys: KeyInterceptor
) -> tuple[grpc.aio.Server, str]:
    """A server to be started, and the address that it is bound to. Raises ConfigError."""
    decoding = DecodingInterceptor(inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name)
    server = grpc.aio.server(interceptors=[keys, decoding], options=_OPTIONS)
    inference_pb2_grpc.add_InferenceServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    services = (inference_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR)
    names = [one.full_name for file in services for one in file.services_by_name.values()]
    reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
    host = f"[{config.host}]" if ":" in config.host else config.host
    credentials = _credentials(config)
    try:
        if credentials is None:
            port = server.add_insecure_port(f"{host}:{config.grpc_port}")
        else:
            port = server.add_secure_port(f"{host}:{config.grpc_port}", credentials)
    except RuntimeError as error:
        raise ConfigError(
            f"{host}:{config.grpc_port} cannot be listened on: it is in use, or not an address of "
            "this machine; give another --grpc-port or --host"
        ) from error
    return server, f"{host}:{port}"


def add_private_socket(server: grpc.aio.Server, path: Path) -> None:
    """A Unix socket that only this user can open, without TLS."""
    path.unlink(missing_ok=True)  # of a gateway that was killed
    server.add_insecure_port(f"unix:{path}")
    path.chmod(0o600)


def _credentials(config: ServeConfig) -> grpc.ServerCredentials | None:
    if tls_context(config) is None:  # gRPC would say nothing but that it cannot bind
        return None
    assert config.ssl_keyfile is not None
    assert config.ssl_certfile is not None
    authorities = None if config.ssl_ca_certs is None else Path(config.ssl_ca_certs).read_bytes()
    pair = (Path(config.ssl_keyfile).read_bytes(), Path(config.ssl_certfile).read_bytes())
    return grpc.ssl_server_credentials(
        [pair], root_certificates=authorities, require_client_auth=authorities is not None
    )
