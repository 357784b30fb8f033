"""One process that a supervisor starts: what it is, and one run of it."""

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .channel import FLAG, Message, encode

# Lines of a child are short; a longer one is none of ours.
_MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Child:
    """A process to keep running.

    command: gets `--channel FD` behind it. options: its first message. drains: on SIGTERM it ends
    its work first, and the others are kept until it has. why_stuck: asked again and again once the
    child is ready; returns the reason to kill it or None, raises when there is no answer.
    """

    name: str
    command: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    drains: bool = False
    why_stuck: Callable[[], Awaitable[str | None]] | None = None


class Process:
    """One run of a child. Make it with start()."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, child: Child) -> "Process":
        """Start the child and send it its options. Raises OSError when the command cannot run."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *child.command,
                    FLAG,
                    str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    # Ctrl-C in a terminal is the supervisor's to pass on.
                    start_new_session=True,
                )
            reader, writer = await asyncio.open_connection(sock=ours, limit=_MAX_LINE_BYTES)
        except BaseException:
            ours.close()
            raise
        writer.write(json.dumps(dict(child.options)).encode() + b"\n")
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def messages(self) -> AsyncIterator[Message]:
        """What the child says, until its end of the line is closed or is not ours."""
        while True:
            try:
                line = await self._reader.readline()
                if not line:
                    return
                message = json.loads(line)
            except (ValueError, ConnectionError):
                return
            yield message

    def tell(self, event: str, **fields: Any) -> None:
        """Queue a message to the child; what it no longer reads is dropped."""
        if not self._writer.is_closing():
            self._writer.write(encode(event, **fields))

    async def wait(self) -> int:
        """The exit code; negative is the signal that ended it. What it said is still to be read."""
        return await self._process.wait()

    def close(self) -> None:
        """End our end of the line."""
        self._writer.close()

    def send(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            self._process.send_signal(number)


def described(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
