"""What `quire engine` does once its options are read: the children, their folder, their secret."""

import asyncio
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ...engine.config import EngineConfig
from ..core_client.client import CoreClient
from .child import Child
from .display import Display
from .folder import private_folder
from .ping import ping
from .supervisor import Limits, Supervisor


@dataclass(frozen=True)
class Front:
    """A process in front of the core: the gateway, or one in front of that. Its first message is
    `options` and besides {"core_socket": path, "front_socket": path, "ping_socket": path, "secret":
    hex}; the second socket is the gateway's, the third its own, where it answers pings.
    """

    name: str
    command: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


def run_engine(
    engine: Mapping[str, Any], fronts: Sequence[Front] = (), limits: Limits | None = None
) -> int:
    """Supervise a core and what is in front of it until a signal ends them. The exit code.

    engine: options of EngineConfig. Raises ConfigError before anything is started.
    """
    EngineConfig(**engine)
    open_standard_streams()
    with private_folder() as folder:
        return asyncio.run(_run(dict(engine), fronts, limits or Limits(), folder))


def open_standard_streams() -> None:
    """Point those of stdin, stdout and stderr that are closed to the null device. Else the next
    socket takes the number of one, and children that write to their stderr write into it.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            os.set_inheritable(opened, True)


async def _run(
    engine: dict[str, Any], fronts: Sequence[Front], limits: Limits, folder: Path
) -> int:
    socket = folder / "core.sock"
    # The same for every core that is started here, and for the fronts: so are hashes of prefixes.
    secret = secrets.token_bytes(32).hex()
    client = CoreClient(socket)
    core = Child(
        "core",
        # -P: the folder that we were started in is no place to import from.
        (sys.executable, "-P", "-m", "quire.serving.core"),
        {"engine": engine, "secret": secret, "socket": str(socket)},
        why_stuck=lambda: why_core_is_stuck(client, limits.step_timeout_s),
    )
    shared = {
        "core_socket": str(socket),
        "front_socket": str(folder / "gateway.sock"),
        "secret": secret,
    }
    children = [core]
    for number, front in enumerate(fronts):
        socket = folder / f"{number}.sock"
        options = {**front.options, **shared, "ping_socket": str(socket)}
        ask = partial(ping, socket)
        children.append(Child(front.name, front.command, options, drains=True, why_stuck=ask))
    display = Display()
    try:
        return await Supervisor(children, limits, display).run()
    finally:
        await client.close()
        display.close()


async def why_core_is_stuck(client: CoreClient, step_timeout_s: float) -> str | None:
    """None while the core moves or has nothing to do. Raises EngineStopped without an answer."""
    status = await client.status(step_timeout_s)
    if status.has_work and status.step_age_ns > step_timeout_s * 1e9:
        return f"a step has not ended for {status.step_age_ns / 1e9:.1f} s"
    return None
