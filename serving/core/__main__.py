"""The core process: `python -m quire.serving.core --channel FD`, started by a supervisor.

The first message of the channel brings its options: {"engine": {…EngineConfig…}, "secret": hex,
"socket": path}. It answers with its phases and "ready", or with "refused" and exit code 2. SIGTERM
ends it at once with exit code 0; it does not outlive its supervisor.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ...engine.config import EngineConfig
from ...engine.errors import UsageError
from ..logs import configure_logs
from ..supervisor.channel import Channel, channel_of

if TYPE_CHECKING:
    from ...engine.startup import Engine


def main() -> int:
    """Exit code, of a core that did not start or whose step loop failed."""
    # Before JAX is loaded: there is nothing to tidy up, and threads inside XLA would not let go.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    # Not straight to stderr: the step loop would wait for whoever reads that.
    close_logs = configure_logs("warning", "text")
    channel = channel_of(sys.argv)
    options = channel.receive()
    socket = Path(options["socket"])
    channel.watch(lambda _: None)
    try:
        config = EngineConfig(**options["engine"])
        engine = _start(config, options["secret"], channel)
    except UsageError as error:
        channel.say("refused", why=str(error))
        close_logs()
        return 2
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(engine, config.max_logprobs, socket, channel))
    close_logs()
    return 1


def _start(config: EngineConfig, secret: str, channel: Channel) -> "Engine":
    from ...engine.startup import start_engine

    return start_engine(
        config,
        lambda line: channel.say("phase", line=line),
        secret=bytes.fromhex(secret),
        progress=lambda what, done, total: channel.say(
            "progress", what=what, done=done, total=total
        ),
    )


async def _serve(engine: "Engine", max_logprobs: int, socket: Path, channel: Channel) -> None:
    """Until the step loop fails or a signal ends the process."""
    from .server import CoreServer, listen

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, os._exit, 0)
    server = CoreServer(engine, max_logprobs)
    listener = await listen(server, socket)
    channel.say("ready")
    await server.failed
    await listener.stop(None)


if __name__ == "__main__":
    # Without the interpreter's farewell: a thread inside XLA would abort it.
    code = main()
    sys.stderr.flush()
    os._exit(code)
