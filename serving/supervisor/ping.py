"""Whether a child's event loop moves: a socket that answers whoever connects, and who asks it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

_ANSWER = b"here\n"


@asynccontextmanager
async def answering_pings(path: Path | None) -> AsyncIterator[None]:
    """While the `async with` lasts. None: there is no supervisor."""
    if path is None:
        yield
        return

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_ANSWER)
        writer.close()

    server = await asyncio.start_unix_server(answer, path)  # in the place of one that was killed
    try:
        yield
    finally:
        server.close()


async def ping(path: Path) -> None:
    """Returns once it has answered. Raises OSError when nobody does; one that stands still takes
    the connection and says nothing.
    """
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        if await reader.readline() != _ANSWER:
            raise ConnectionResetError("the connection was closed without an answer")
    finally:
        writer.close()
