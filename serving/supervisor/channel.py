"""The line between the supervisor and one child: JSON objects, one a line, both ways over a pair of
sockets. Here is the child's end.

The first message to a child brings its options, so that no secret is on a command line. The end of
the line is the end of the supervisor, after which a child must not live on.

To the child:   {"event": "child", "name": …, "state": "starting"|"ready"|"ended", "restarts": n}
From the child: {"event": "phase", "line": …}
                {"event": "progress", "what": …, "done": n, "total": n}
                {"event": "ready", "address": …}     an address only if others call it
                {"event": "refused", "why": …}       and exit code 2
"""

import ctypes
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

logger = logging.getLogger(__name__)

Message = dict[str, Any]

FLAG = "--channel"
_PR_SET_PDEATHSIG = 1


def encode(event: str, **fields: Any) -> bytes:
    return json.dumps({"event": event, **fields}).encode() + b"\n"


def channel_of(arguments: Sequence[str]) -> "Channel":
    """The channel that a supervisor gave this process in its arguments. Ends the process with exit
    code 2 if there is none.
    """
    try:
        fd = int(arguments[arguments.index(FLAG) + 1])
        return Channel(socket.socket(fileno=fd))
    except (ValueError, IndexError, OSError) as error:
        print(
            f"quire: this process is started by a supervisor, which gives it {FLAG} FD ({error}); "
            "use the quire command",
            file=sys.stderr,
        )
        raise SystemExit(2) from error


class Channel:
    """The child's end. say() may be called from any thread."""

    def __init__(self, end: socket.socket) -> None:
        end.set_inheritable(False)
        self._socket = end
        self._lines = end.makefile("rb")
        self._lock = threading.Lock()
        if sys.platform == "linux":
            # Also for a child that is stopped or stuck and would not notice the end of the line.
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def receive(self) -> Message:
        """The next message. Ends the process when there will be none."""
        line = self._lines.readline()
        if not line:
            os._exit(1)
        message: Message = json.loads(line)
        return message

    def watch(self, on_message: Callable[[Message], None]) -> None:
        """From now on call back for each message, on a thread of its own, and end the process when
        the supervisor is gone.
        """

        def follow() -> None:
            try:
                while True:
                    on_message(self.receive())
            except Exception:
                logger.exception("a message of the supervisor could not be handled")
            os._exit(1)  # deaf, it would live on without its supervisor

        threading.Thread(target=follow, name="quire-channel", daemon=True).start()

    def say(self, event: str, **fields: Any) -> None:
        try:
            with self._lock:
                self._socket.sendall(encode(event, **fields))
        except OSError:
            os._exit(1)
