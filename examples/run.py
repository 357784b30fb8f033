"""Runs the example clients against `quire engine` and checks what they print, first with a key,
then with TLS besides. `make examples` installs their packages, makes their stubs and runs this.
"""

import re
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from server import ROOT, Ran, fail, run_client, server, show

HERE = Path(__file__).parent
CLIENTS = {
    "Python": (str(ROOT / ".venv-examples/bin/python"), str(HERE / "python/client.py")),
    "TypeScript": ("node", str(HERE / "typescript/dist/client.js")),
}
# Every line of both clients, in this order. The embedded model is greedy here, so it says the same
# each time; where the cancel of session 3 comes is not known.
EXPECTED = (
    r"health: SERVING",
    r"model: quire-demo, 2048 tokens",
    r"generate: ' Paris\.', FINISH_REASON_STOP, \d+ tokens",
    r"stream: 23 \+ 58 = 81\.",
    r"session 1: 2 \+ 3 = 5\.",
    r"session 2: The capital of Japan is Tokyo\.",
    r"session 3: Once.* … cancelled",
    r"expected error: INVALID_ARGUMENT: temperature must be .* got 9(\.0)?",
    r"  field sampling_params\.temperature",
    r"expected error: DEADLINE_EXCEEDED: (?i:deadline exceeded).*",
)
MAKE_CERTIFICATE = (
    "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost "
    "-addext subjectAltName=IP:127.0.0.1,DNS:localhost"
)
# Few programs: this start is to be short.
SMALL = ("--token-buckets", "8,64", "--max-num-batched-tokens", "64", "--max-num-seqs", "4")


def main() -> int:
    key = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with server("engine", folder / "log", key) as at:
            for language in CLIENTS:
                check(language, run(language, at["grpc"], "--api-key", key))
                refused = run(language, at["grpc"], QUIRE_API_KEY="wrong")
                if refused.returncode != 1 or "UNAUTHENTICATED: the key is" not in refused.stderr:
                    fail(f"the {language} client was let in with a wrong key", refused)
        certificate, private = make_certificate(folder)
        tls = ("--ssl-certfile", certificate, "--ssl-keyfile", private)
        with server("engine", folder / "log of tls", key, *SMALL, *tls) as at:
            for language in CLIENTS:
                check(language, run(language, at["grpc"], "--ca", certificate, QUIRE_API_KEY=key))
    print("the examples print what they should")
    return 0


def run(language: str, target: str, *flags: str, **environment: str) -> Ran:
    return run_client([*CLIENTS[language], "--target", target, *flags], environment)


def check(language: str, ran: Ran) -> None:
    lines = ran.stdout.splitlines()
    if ran.returncode != 0 or len(lines) != len(EXPECTED):
        fail(f"the {language} client ended with {ran.returncode} and {len(lines)} lines", ran)
    for line, pattern in zip(lines, EXPECTED, strict=True):
        if not re.fullmatch(pattern, line):
            fail(f"the {language} client was to print {pattern!r}, not {line!r}", ran)
    show(language, ran)


def make_certificate(folder: Path) -> tuple[str, str]:
    """Of 127.0.0.1, signed by itself: the file, and that of its private key."""
    certificate, private = str(folder / "cert.pem"), str(folder / "key.pem")
    try:
        subprocess.run(
            [*MAKE_CERTIFICATE.split(), "-keyout", private, "-out", certificate],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        sys.exit("make examples needs the command openssl, for a certificate of its own")
    return certificate, private


if __name__ == "__main__":
    sys.exit(main())
