"""Keeps a list of children running: starts them, restarts those that end or are stuck, stops all.

Knows processes, signals and time; what a child does, and how one sees that it is stuck, come with
the child. Everything runs on one asyncio loop in the main thread.
"""

import asyncio
import signal
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...engine.errors import ConfigError
from .channel import Message
from .child import Child, Process, described
from .display import Display

REFUSED = 2  # the exit code of a child that must not be started again: the user can mend it
# From SIGTERM to SIGKILL, for a child that only has to end; and what a draining one gets beyond its
# time, so that it can say what it gave up.
_STOP_S = 2.0


@dataclass(frozen=True)
class Limits:
    """step_timeout_s: a child that gives no sign of life, or makes none of progress, for so long is
    killed. drain_timeout_s: what open requests get at the end. More than max_restarts of one child
    in restart_window_s end everything.
    """

    step_timeout_s: float = 30.0
    drain_timeout_s: float = 30.0
    max_restarts: int = 5
    restart_window_s: float = 300.0

    def __post_init__(self) -> None:
        if self.step_timeout_s <= 0:
            raise ConfigError(
                f"step_timeout_s must be more than 0 seconds, got {self.step_timeout_s}"
            )
        for name in ("drain_timeout_s", "max_restarts", "restart_window_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class _End:
    """Why supervision ends of itself."""

    code: int
    why: str


class _Kept:
    """A child and its history."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.process: Process | None = None
        self.state = "starting"
        self.num_restarts = 0
        self.restarted_at: deque[float] = deque()
        self.is_stopping = False
        self.refusal: str | None = None
        self.is_ready = asyncio.Event()
        self.was_ready = False  # in this run or an earlier one
        self.ended_s = 0.0  # when the last run did
        self.address: str | None = None


class Supervisor:
    """run() once. Make it where an asyncio loop runs."""

    def __init__(self, children: Iterable[Child], limits: Limits, display: Display) -> None:
        self._kept = [_Kept(child) for child in children]
        self._limits = limits
        self._display = display
        self._stop: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._killed_by: signal.Signals | None = None
        self._started_s = time.monotonic()
        self._was_ready = False  # all of them, at once

    async def run(self) -> int:
        """Until a signal, a refusal or too many restarts. The exit code: 0 stopped by a signal, 1
        gave up, 2 refused by a child, 130 or 143 killed by a second signal.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        keepers = {asyncio.create_task(self._keep(kept)): kept for kept in self._kept}
        try:
            waited: list[asyncio.Future[Any]] = [*keepers, self._stop]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            ended = [task.result() for task in keepers if task.done()]
            is_asked = self._stop.done()
            draining = [kept for kept in self._kept if kept.child.drains]
            if is_asked:
                await self._end(draining, keepers, self._limits.drain_timeout_s + _STOP_S)
            await self._end([k for k in self._kept if not k.is_stopping], keepers, _STOP_S)
        finally:
            self._kill_all()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
        if self._killed_by is not None:
            return 128 + self._killed_by
        if is_asked:
            return 0
        end = next(end for end in ended if end is not None)
        self._display.line(f"quire: {end.why}")
        return end.code

    def _on_signal(self, number: signal.Signals) -> None:
        if not self._stop.done():
            self._stop.set_result(None)
            return
        self._killed_by = number
        self._kill_all()

    def _kill_all(self) -> None:
        for kept in self._kept:
            kept.is_stopping = True
            if kept.process is not None:
                kept.process.send(signal.SIGKILL)

    async def _end(
        self, some: list[_Kept], keepers: dict[asyncio.Task[_End | None], _Kept], timeout_s: float
    ) -> None:
        """Ask them to end, and kill those that have not in time."""
        for kept in some:
            kept.is_stopping = True
            if kept.process is not None:
                kept.process.send(signal.SIGTERM)
        tasks = [task for task, kept in keepers.items() if kept in some]
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=timeout_s)
        for task in late:
            kept = keepers[task]
            if kept.process is not None:
                self._display.line(
                    f"quire: the {kept.child.name} did not end within {timeout_s:g} s; killing it"
                )
                kept.process.send(signal.SIGKILL)
        await asyncio.wait(tasks)

    # One child

    async def _keep(self, kept: _Kept) -> _End | None:
        """Run the child again and again. None: it was to end."""
        name = kept.child.name
        while not kept.is_stopping:
            self._announce(kept, "starting")
            try:
                kept.process = await Process.start(kept.child)
            except OSError as error:
                return _End(1, f"the {name} could not be started: {error}")
            code, why = await self._run_once(kept, kept.process)
            kept.process = None
            kept.ended_s = time.monotonic()
            self._display.drop_progress()
            self._announce(kept, "ended")
            if kept.is_stopping:
                return None
            if code == REFUSED:
                return _End(REFUSED, kept.refusal or f"the {name} refused to start")
            limits, now = self._limits, kept.ended_s
            while kept.restarted_at and now - kept.restarted_at[0] > limits.restart_window_s:
                kept.restarted_at.popleft()
            if len(kept.restarted_at) >= limits.max_restarts:
                return _End(
                    1,
                    f"the {name} ended ({why}) after {limits.max_restarts} restarts in "
                    f"{limits.restart_window_s:g} s; giving up, its messages above say more",
                )
            kept.restarted_at.append(now)
            kept.num_restarts += 1
            self._display.line(
                f"quire: the {name} ended ({why}); restarting it ({len(kept.restarted_at)} of "
                f"{limits.max_restarts} times in {limits.restart_window_s:g} s)"
            )
        return None

    async def _run_once(self, kept: _Kept, process: Process) -> tuple[int, str]:
        """From a started process to its end: the exit code, and why it ended."""
        kept.is_ready.clear()
        if kept.is_stopping:  # the signal came while it was being started
            process.send(signal.SIGTERM if self._killed_by is None else signal.SIGKILL)
        for other in self._kept:
            if other is not kept:
                process.tell("child", **_shown(other))
        listening = asyncio.create_task(self._listen(kept, process))
        watching = asyncio.create_task(self._watch(kept))
        exited = asyncio.create_task(process.wait())
        try:
            await asyncio.wait([watching, exited], return_when=asyncio.FIRST_COMPLETED)
            stuck = watching.result() if watching.done() else None
            if stuck is not None:
                process.send(signal.SIGKILL)
            code = await exited
            await asyncio.wait([listening], timeout=_STOP_S)  # its last words
        finally:
            listening.cancel()
            watching.cancel()
            process.close()
        return code, stuck or described(code)

    async def _listen(self, kept: _Kept, process: Process) -> None:
        async for message in process.messages():
            self._on_message(kept, message)

    def _on_message(self, kept: _Kept, message: Message) -> None:
        match message:
            case {"event": "phase", "line": str(line)}:
                self._display.line(line)
            case {"event": "progress", "what": str(what), "done": int(done), "total": int(total)}:
                self._display.progress(what, done, total)
            case {"event": "refused", "why": str(why)}:
                kept.refusal = why
            case {"event": "ready"}:
                address = message.get("address")
                kept.address = address if isinstance(address, str) else None
                self._on_ready(kept)

    def _on_ready(self, kept: _Kept) -> None:
        self._announce(kept, "ready")
        kept.is_ready.set()
        now = time.monotonic()
        if kept.was_ready:
            self._display.line(
                f"quire: the {kept.child.name} is ready again after {now - kept.ended_s:.1f} s"
                f"{_serving([kept])}"
            )
        kept.was_ready = True
        if not self._was_ready and all(k.state == "ready" for k in self._kept):
            self._was_ready = True
            self._display.headline(
                f"quire: ready in {now - self._started_s:.1f} s{_serving(self._kept)}"
            )

    async def _watch(self, kept: _Kept) -> str:
        """Why the child is stuck, once it is. A start has no limit: a download may take long."""
        await kept.is_ready.wait()
        ask, timeout_s = kept.child.why_stuck, self._limits.step_timeout_s
        if ask is None:
            await asyncio.Future()  # until cancelled: only its end is watched
        assert ask is not None
        answered = time.monotonic()
        while True:  # until cancelled, with the process
            await asyncio.sleep(min(1.0, timeout_s / 4))
            try:
                async with asyncio.timeout(timeout_s):
                    why = await ask()
            except Exception as error:
                # Whatever a question raises, it was not answered; once is no reason to kill.
                if time.monotonic() - answered >= timeout_s:
                    return f"it has not answered for {timeout_s:g} s: {str(error) or 'timed out'}"
                continue
            answered = time.monotonic()
            if why is not None:
                return why

    def _announce(self, kept: _Kept, state: str) -> None:
        """Tell the other children."""
        kept.state = state
        for other in self._kept:
            if other is not kept and other.process is not None:
                other.process.tell("child", **_shown(kept))


def _serving(some: Iterable[_Kept]) -> str:
    """Where clients find them, if they do."""
    addresses = [kept.address for kept in some if kept.address is not None]
    return f", serving on {' and '.join(addresses)}" if addresses else ""


def _shown(kept: _Kept) -> dict[str, str | int]:
    return {"name": kept.child.name, "state": kept.state, "restarts": kept.num_restarts}
