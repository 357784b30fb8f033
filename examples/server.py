"""A server of the embedded model, and a client that is run in front of it."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S, CLIENT_TIMEOUT_S, STOP_TIMEOUT_S = 300, 60, 60
_SERVING = re.compile(r"ready in .*, serving on (?P<grpc>\S+) \(gRPC\)(?: and (?P<http>\S+))?\n")
# What of the caller's environment would tell a client of another server, or of a key.
_OF_CLIENTS = ("QUIRE_API_KEY", "VLLM_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL", "HF_TOKEN")

Ran = subprocess.CompletedProcess[str]


@contextmanager
def server(verb: str, log: Path, key: str, *flags: str) -> Iterator[dict[str, str]]:
    """The addresses of a `quire engine` or `quire serve`, which ends with the block: grpc, http."""
    command = [str(ROOT / ".venv/bin/quire"), verb, "--grpc-port", "0", *flags]
    with log.open("w") as stderr:
        environment = os.environ | {"QUIRE_API_KEY": key}
        process = subprocess.Popen(command, stderr=stderr, env=environment)
    try:
        yield _addresses_once_ready(process, log)
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.returncode != 0:
        sys.exit(f"the server ended with exit code {process.returncode}:\n{log.read_text()}")


def run_client(command: Sequence[str], environment: Mapping[str, str]) -> Ran:
    """A client, which knows of servers and keys only what it is given here."""
    return subprocess.run(
        command,
        env=environment_of_client() | environment,
        capture_output=True,
        text=True,
        timeout=CLIENT_TIMEOUT_S,
        check=False,
    )


def environment_of_client() -> dict[str, str]:
    inherited = {name: v for name, v in os.environ.items() if name not in _OF_CLIENTS}
    return inherited | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


def show(name: str, ran: Ran) -> None:
    print(f"{name}:", *ran.stdout.splitlines(), sep="\n  ", flush=True)


def fail(why: str, ran: Ran) -> NoReturn:
    sys.exit(f"{why}:\n{ran.stdout}{ran.stderr}")


def _addresses_once_ready(process: "subprocess.Popen[bytes]", log: Path) -> dict[str, str]:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        if found := _SERVING.search(log.read_text()):
            return found.groupdict()
        time.sleep(0.05)
    sys.exit(f"the server did not start:\n{log.read_text()}")
