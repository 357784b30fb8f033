"""The gateway put together: from its options to a server that serves, and to its end."""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from ...engine.config import EngineConfig
from ...engine.model_source import find_model
from ...engine.request import FinishReason
from ...engine.text_files import TextFiles, open_text
from ...engine.token_checks import TokenLimits
from .. import collector
from ..config import ServeConfig
from ..core_client.client import CoreClient, CoreStatus
from ..keys import bearer_key, front_key
from ..tls import tls_context
from .about import About
from .callers import Callers
from .core_link import CoreLink
from .health import Health
from .intake import Intake
from .listener import KeyInterceptor, add_private_socket, make_listener
from .metrics import GatewayMetrics
from .metrics_http import start_metrics_server
from .prepare import Served
from .registry import Registry
from .service import InferenceService
from .waiting import Waiting, WaitingLimits

logger = logging.getLogger(__name__)

# From the last answer to the end of the calls that carry it.
_STOP_GRACE_S = 1.0
_DRAIN_POLL_S = 0.02


@dataclass(frozen=True)
class GatewayOptions:
    """What a supervisor says: options of EngineConfig and ServeConfig as they were given, the
    core's socket, the secret that all processes of the engine share, and the socket to make for
    fronts of the same engine, which show `front_key(secret)`.
    """

    engine: Mapping[str, Any]
    serve: Mapping[str, Any]
    core_socket: Path
    secret: bytes
    front_socket: Path | None = None


class Gateway:
    """Make it where an asyncio loop runs; then start(), and at the end drain()."""

    def __init__(self, options: GatewayOptions) -> None:
        self._engine_config = EngineConfig(**options.engine)
        self._config = ServeConfig(**options.serve)
        model = self._engine_config.model or "quire-demo"
        self._names = self._config.served_model_name or (model,)
        self.metrics = GatewayMetrics(self._names[0])
        keys = self._config.api_key
        # Without keys everybody is the same caller, fronts too.
        self._callers = Callers(keys and (*keys, front_key(options.secret)), options.secret)
        self._front_socket = options.front_socket
        self._client = CoreClient(options.core_socket)
        waiting = Waiting(
            WaitingLimits(self._config.max_num_queued_reqs, self._config.max_num_queued_tokens),
            self.metrics,
        )
        self._registry = Registry(
            self.metrics,
            logs_requests=self._config.enable_log_requests,
            max_log_len=self._config.max_log_len,
        )
        self.health = Health(self._client, self.metrics, self._config.step_timeout, self._on_status)
        self.link = CoreLink(
            self._client, self.metrics, self.health.on_lost, self._registry.on_ended
        )
        self.intake = Intake(self._callers, waiting, self._registry, self.link, self.metrics)
        about = About(options.engine, options.serve)
        self._service = InferenceService(
            self.intake, self._callers, self.link.fail, about, self.metrics
        )
        self._files: TextFiles | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._listener: grpc.aio.Server | None = None
        self._metrics_server: asyncio.Server | None = None

    async def start(self) -> str:
        """Listen, and then read the model's text files. The address. Raises UsageError.

        Health is SERVING when besides the core has answered.
        """
        keys = KeyInterceptor(self._callers, self.intake.note_unauthenticated)
        self._listener, address = make_listener(self._config, self._service, self.health, keys)
        if self._front_socket is not None:
            add_private_socket(self._listener, self._front_socket)
        if self._config.metrics_port is not None:
            self._metrics_server = await start_metrics_server(
                self._config.host,
                self._config.metrics_port,
                self.metrics.render,
                self._may_scrape,
                tls_context(self._config),
            )
            port = self._metrics_server.sockets[0].getsockname()[1]
            logger.info("metrics are at port %d, path /metrics", port)
        await self._listener.start()
        self._tasks = [
            asyncio.create_task(self.link.run()),
            asyncio.create_task(self.health.run()),
            asyncio.create_task(collector.collect(lambda: self._registry.num_open == 0)),
        ]
        self._files = await asyncio.to_thread(_open_text, self._engine_config)
        return address

    def note_restarts(self, num_restarts: int) -> None:
        """Of the core, by the supervisor."""
        self.metrics.core_restarts = num_restarts

    async def drain(self) -> None:
        """Take nothing new, let what is open end in the time there is, then end."""
        self.intake.is_draining = True
        await self.health.drain()
        deadline = time.monotonic() + self._config.drain_timeout
        while self._registry.num_open or self._service.has_unread:
            if time.monotonic() >= deadline:
                break
            await asyncio.sleep(_DRAIN_POLL_S)
        for request in self.link.open_requests():
            self.link.finish(request, FinishReason.ABORT)
        self._service.close()
        if self._listener is not None:
            await self._listener.stop(_STOP_GRACE_S)
        await self.close()

    async def close(self) -> None:
        """End at once."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._metrics_server is not None:
            self._metrics_server.close()
        if self._listener is not None:
            await self._listener.stop(None)
        self.intake.close()
        await self._client.close()

    def _on_status(self, status: CoreStatus) -> bool:
        """Whether requests can be taken, now that the core has said what it can."""
        if self._files is None:
            return False
        if self.intake.served is None:
            limits = TokenLimits(
                status.vocab_size, status.max_model_len, self._engine_config.max_logprobs
            )
            self.intake.served = Served(
                self._files,
                self._names,
                limits,
                takes_priorities=self._engine_config.scheduling_policy == "priority",
            )
        return True

    def _may_scrape(self, header: str | None) -> bool:
        return self._callers.is_known(bearer_key(header or ""))


def _open_text(config: EngineConfig) -> TextFiles:
    source = find_model(config.model, revision=config.revision, download_dir=config.download_dir)
    return open_text(config, source)
