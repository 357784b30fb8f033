"""Runs the clients of clients/ against `quire serve`: each must get right answers with the key, and
fail without it. `make clients` installs their packages and runs this.
"""

import re
import secrets
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from server import ROOT, fail, run_client, server, show

CLIENTS = Path(__file__).parent / "clients"
PYTHON = str(ROOT / ".venv-clients/bin/python")
PROGRAMS = {".py": PYTHON, ".mjs": "node", ".sh": "bash"}
FILES = sorted(path for path in CLIENTS.iterdir() if path.suffix in PROGRAMS)
# They ask other things too; this all of them do.
ANSWER = "23 + 58 = 81."
NUM_LEFT = 2  # streams that openai_chat.mjs leaves in the middle
IDLE_TIMEOUT_S = 30


def main() -> int:
    key = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory() as folder,
        server("serve", Path(folder) / "log", key, "--port", "0") as at,
    ):
        for path in FILES:
            command = [PROGRAMS[path.suffix], str(path)]
            given = {"OPENAI_BASE_URL": f"{at['http']}/v1", "OPENAI_API_KEY": key}
            ran = run_client(command, given)
            if ran.returncode != 0 or ANSWER not in ran.stdout:
                fail(f"{path.name} ended with {ran.returncode}", ran)
            show(path.name, ran)
            refused = run_client(command, given | {"OPENAI_API_KEY": "wrong"})
            if refused.returncode == 0 or "401" not in refused.stdout + refused.stderr:
                fail(f"{path.name} was to be refused with a wrong key", refused)
        check_nothing_is_left(at["http"], key)
    print(f"{len(FILES)} clients got what they should")
    return 0


def check_nothing_is_left(url: str, key: str) -> None:
    """Nothing is open, nothing failed, and what was left in the middle was ended."""
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while (open_now := metric(url, key, "quire_requests_open")) and time.monotonic() < deadline:
        time.sleep(0.05)
    finished = {
        reason: metric(url, key, f'quire_requests_finished_total{{finished_reason="{reason}"')
        for reason in ("stop", "abort", "error")
    }
    print("the server's count:", finished, flush=True)
    if open_now or finished["error"] or finished["abort"] != NUM_LEFT or not finished["stop"]:
        sys.exit(f"{open_now} requests are open still; those that ended: {finished}")


def metric(url: str, key: str, name: str) -> int:
    """The first value whose line begins so."""
    asked = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(asked, timeout=10) as answer:
        found = re.search(rf"^{re.escape(name)}.* (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found is not None, name
    return int(float(found[1]))


if __name__ == "__main__":
    sys.exit(main())
