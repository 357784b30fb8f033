"""A child without an engine: its options say how it behaves. Lines of its log say what happened."""

import asyncio
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from quire.serving.supervisor import ping
from quire.serving.supervisor.channel import channel_of


def answer_pings(path: str) -> None:
    async def answering() -> None:
        async with ping.answering_pings(Path(path)):
            await asyncio.Future()

    asyncio.run(answering())


def main() -> None:
    channel = channel_of(sys.argv)
    options = channel.receive()

    def note(line: str) -> None:
        with open(options["log"], "a") as log:
            log.write(f"{line}\n")

    def end(*_: Any) -> None:
        note("term")
        if options.get("is_deaf"):
            return
        time.sleep(options.get("drain_s", 0))
        note("drained")
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    if "ping_socket" in options:
        threading.Thread(target=answer_pings, args=(options["ping_socket"],), daemon=True).start()
    note(f"pid {os.getpid()}")
    channel.watch(lambda m: note(f"{m['name']} {m['state']} {m['restarts']}"))
    if "refusal" in options:
        channel.say("refused", why=options["refusal"])
        sys.exit(2)
    if "exit_code" in options:
        sys.exit(options["exit_code"])
    for what, done, total in options.get("progress", ()):
        channel.say("progress", what=what, done=done, total=total)
    channel.say("ready", **{k: v for k, v in options.items() if k == "address"})
    while True:  # until a signal
        signal.pause()


if __name__ == "__main__":
    main()
