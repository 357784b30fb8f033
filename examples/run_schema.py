"""Runs schemathesis over /openapi.json of `quire serve`: whatever is sent, nothing may fail, and
answers must be as the document says. `make clients` installs it and runs this.
"""

import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from server import ROOT, environment_of_client, server

CONFIG = Path(__file__).parent / "schemathesis.toml"
# Answers end soon, and so does the run.
SMALL = ("--max-model-len", "128", "--max-num-batched-tokens", "128", "--max-num-seqs", "32")
TIMEOUT_S = 300


def main() -> int:
    key = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory() as folder,
        server("serve", Path(folder) / "log", key, "--port", "0", *SMALL) as at,
    ):
        command = [
            str(ROOT / ".venv-clients/bin/schemathesis"),
            f"--config-file={CONFIG}",
            "run",
            f"{at['http']}/openapi.json",
            f"--header=Authorization: Bearer {key}",
        ]
        # It leaves its own files where it runs.
        ran = subprocess.run(
            command, cwd=folder, env=environment_of_client(), timeout=TIMEOUT_S, check=False
        )
    return ran.returncode


if __name__ == "__main__":
    sys.exit(main())
