"""A Chromium for tests: the one on the PATH, else the one of an npm package.

It is driven over its debugging pipe (JSON with a zero byte after each message), so no package of
ours is needed.
"""

import fcntl
import hashlib
import json
import os
import select
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WAIT_S = 60.0
NPM_PACKAGE = "@sparticuz/chromium@153.0.0"
NPM_SHA256 = "20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0"
ON_PATH = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
UNBROTLI = "process.stdin.pipe(zlib.createBrotliDecompress()).pipe(process.stdout)"


def chromium() -> tuple[str, dict[str, str]]:
    """A browser's program, and the environment that it needs."""
    for name in ON_PATH:
        if found := shutil.which(name):
            return found, dict(os.environ)
    home = Path(tempfile.gettempdir()) / f"quire-tests-{os.geteuid()}" / f"browser-{NPM_SHA256[:8]}"
    if not home.is_dir():
        made = home.with_name(f"{home.name}-{os.getpid()}")
        _unpack_from_npm(made)
        made.rename(home)
    libraries = f"{home / 'lib'}:{os.environ.get('LD_LIBRARY_PATH', '')}".strip(":")
    return str(home / "chromium"), os.environ | {"LD_LIBRARY_PATH": libraries}


def _unpack_from_npm(folder: Path) -> None:
    if not (shutil.which("npm") and shutil.which("node")):
        pytest.fail("there is no browser: install Chromium, or node and npm, which bring one")
    folder.mkdir(parents=True)
    command = ["npm", "pack", "--silent", NPM_PACKAGE]
    packed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if packed.returncode != 0:
        pytest.fail(f"there is no Chromium here, and npm brings none:\n{packed.stderr}")
    tarball = folder / packed.stdout.split()[-1]
    assert hashlib.sha256(tarball.read_bytes()).hexdigest() == NPM_SHA256
    with tarfile.open(tarball) as package:
        package.extractall(folder, filter="data")
    tarball.unlink()
    for name in ("chromium", "al2023.tar"):  # the program, and libraries that a bare system lacks
        packed_file = folder / "package" / "bin" / f"{name}.br"
        with packed_file.open("rb") as source, (folder / name).open("wb") as target:
            subprocess.run(["node", "-e", UNBROTLI], stdin=source, stdout=target, check=True)
    (folder / "chromium").chmod(0o755)
    with tarfile.open(folder / "al2023.tar") as libraries:
        libraries.extractall(folder, filter="data")
    shutil.rmtree(folder / "package")


class Tab:
    """One page of a browser of its own; leaving the `with` ends the browser."""

    def __init__(self, profile: Path) -> None:
        program, environment = chromium()
        read, their_write = os.pipe()
        their_read, write = os.pipe()
        # Chromium reads from 3 and writes to 4; numbers above these are not in the way.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (their_read, their_write)]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "bash", program, "--headless",
             "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             f"--user-data-dir={profile}", "--window-size=1000,760", "--remote-debugging-pipe"],
            env=environment, pass_fds=ends, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in (their_read, their_write, *ends):
            os.close(fd)
        self._read, self._write = read, write
        self._rest = b""
        self._num_sent = 0
        self._session: str | None = None
        self.complaints: list[str] = []

    def __enter__(self) -> "Tab":
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        attached = self.do("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.do(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._write)  # without its pipe it ends
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)

    def do(self, method: str, **params: Any) -> Any:
        """One command of the DevTools protocol, and its result."""
        self._num_sent += 1
        command = {"id": self._num_sent, "method": method, "params": params}
        if self._session is not None:
            command["sessionId"] = self._session
        os.write(self._write, json.dumps(command).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == self._num_sent:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def value(self, expression: str) -> Any:
        """Of JavaScript; a promise is waited for."""
        done = self.do(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def text(self, selector: str) -> str:
        """What can be seen of the last such element; nothing, if there is none."""
        last = f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)"
        return str(self.value(f"{last}?.checkVisibility() ? {last}.innerText : ''"))

    def until(self, is_so: Callable[[], object]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not is_so():
            assert time.monotonic() < deadline, self.value("document.body.innerText")
            time.sleep(0.02)

    def type(self, text: str, *, into: str) -> None:
        self.value(f"document.querySelector({json.dumps(into)}).focus()")
        self.do("Input.insertText", text=text)

    def press(self, key: str, code: int, *, shift: bool = False) -> None:
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        text = {"text": "\r"} if key == "Enter" else {}
        self.do("Input.dispatchKeyEvent", type="keyDown", modifiers=8 * shift, **common, **text)
        self.do("Input.dispatchKeyEvent", type="keyUp", modifiers=8 * shift, **common)

    def enter(self, *, shift: bool = False) -> None:
        self.press("Enter", 13, shift=shift)

    def _next(self) -> Any:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], WAIT_S)
            piece = os.read(self._read, 1 << 16) if ready else b""
            assert piece, "the browser ended, or does not answer"
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def _note(self, message: Any) -> None:
        """What went wrong in the page; a refused request is no fault of it."""
        if message["method"] == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(message["params"]))
        entry = message.get("params", {}).get("entry", {})
        if entry.get("level") == "error" and entry["source"] != "network":
            self.complaints.append(entry["text"])
