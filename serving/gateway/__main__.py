"""The gateway process: `python -m quire.serving.gateway --channel FD`, started by a supervisor.

The first message of the channel brings its options: {"engine": {…}, "serve": {…}, "core_socket":
path, "front_socket": path, "ping_socket": path, "secret": hex}. It answers "ready" with its address
once it serves, or "refused" and exit code 2. SIGTERM drains it; it does not outlive its supervisor.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path

from ...engine.errors import UsageError
from .. import collector, malloc
from ..logs import configure_logs
from ..supervisor.channel import Channel, Message, channel_of
from ..supervisor.ping import answering_pings

# So that the event loop does not wait long for a thread that renders or checks a prompt.
_SWITCH_INTERVAL_S = 0.0005


def main() -> int:
    """Exit code, of a gateway that has drained or did not start."""
    malloc.use_one_arena()
    channel = channel_of(sys.argv)
    options = channel.receive()
    serve = options["serve"]
    close_logs = configure_logs(serve.get("log_level", "info"), serve.get("log_format", "text"))
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(_serve(options, channel))
    close_logs()
    return code


async def _serve(options: Message, channel: Channel) -> int:
    async with answering_pings(Path(options["ping_socket"])):
        return await _serve_until_stopped(options, channel)


async def _serve_until_stopped(options: Message, channel: Channel) -> int:
    from .gateway import Gateway, GatewayOptions

    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    try:
        gateway = Gateway(
            GatewayOptions(
                options["engine"],
                options["serve"],
                Path(options["core_socket"]),
                bytes.fromhex(options["secret"]),
                Path(options["front_socket"]),
            )
        )

        def on_message(message: Message) -> None:
            if message.get("event") == "child" and message.get("name") == "core":
                loop.call_soon_threadsafe(gateway.note_restarts, int(message["restarts"]))

        channel.watch(on_message)
        address = await gateway.start()
    except UsageError as error:
        channel.say("refused", why=str(error))
        return 2
    collector.calm()
    serving = asyncio.create_task(gateway.health.has_served.wait())
    stopping = asyncio.create_task(stopped.wait())
    await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        channel.say("ready", address=f"{address} (gRPC)")
    await stopping
    await gateway.drain()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Without the interpreter's farewell: a thread may still be at a prompt that nobody waits for.
    os._exit(code)
