"""Whether the server serves, said to whoever asks by the standard health service.

It serves when the core has answered lately and its step loop moves. A core that is gone, stuck or
starting, and a server that drains, does not, however alive this process is.
"""

import asyncio
import logging
from collections.abc import Callable

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio

from ...engine.errors import EngineStopped
from ..core_client.client import CoreClient, CoreStatus
from .metrics import GatewayMetrics

logger = logging.getLogger(__name__)

SERVICES = ("", "quire.v1.Inference")
_INTERVAL_S = 1.0
_INTERVAL_AWAY_S = 0.1  # while the core is gone: it is to be seen at once when it is back


class Health:
    """Asks the core again and again; run() is to be a task for as long as the process lives."""

    def __init__(
        self,
        client: CoreClient,
        metrics: GatewayMetrics,
        step_timeout_s: float,
        on_status: Callable[[CoreStatus], bool],
    ) -> None:
        """on_status: takes each answer of the core; whether this process is ready to serve."""
        self._client = client
        self._metrics = metrics
        self._step_timeout_s = step_timeout_s
        self._on_status = on_status
        self._is_draining = False
        self._is_poked = asyncio.Event()
        self.has_served = asyncio.Event()
        self.servicer = health_aio.HealthServicer()

    async def run(self) -> None:
        """Until cancelled."""
        await self._set(False)
        while True:
            is_serving = await self._ask()
            await self._set(is_serving and not self._is_draining)
            interval_s = _INTERVAL_S if is_serving else _INTERVAL_AWAY_S
            self._is_poked.clear()
            try:
                async with asyncio.timeout(min(interval_s, self._step_timeout_s / 4)):
                    await self._is_poked.wait()
            except TimeoutError:
                continue

    def on_lost(self) -> None:
        """The core is gone: look now."""
        self._metrics.core = None
        self._metrics.is_serving = False
        self._is_poked.set()

    async def drain(self) -> None:
        """From now on it does not serve."""
        self._is_draining = True
        await self._set(False)

    async def _ask(self) -> bool:
        try:
            status = await self._client.status(self._step_timeout_s)
        except EngineStopped:
            self._metrics.core = None
            return False
        except Exception:
            # Whatever the answer was, it is not one: that must not end the asking.
            logger.exception("the core's status cannot be read")
            self._metrics.core = None
            return False
        self._metrics.core = status
        is_stuck = status.has_work and status.step_age_ns > self._step_timeout_s * 1e9
        return self._on_status(status) and not is_stuck

    async def _set(self, is_serving: bool) -> None:
        self._metrics.is_serving = is_serving
        if is_serving:
            self.has_served.set()
        serving = health_pb2.HealthCheckResponse.ServingStatus
        status = serving.SERVING if is_serving else serving.NOT_SERVING
        for service in SERVICES:
            await self.servicer.set(service, status)
