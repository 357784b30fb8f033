"""Bearer keys: how they are sent, and the one that processes of an engine show to each other."""

import hashlib


def bearer_key(value: str) -> str:
    """The key of an authorization header; empty if it has none."""
    scheme, _, key = value.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def front_key(secret: bytes) -> str:
    """The key of the processes in front of an engine that its supervisor starts. secret: of all
    processes of that engine.
    """
    return hashlib.blake2b(b"", key=secret, digest_size=32, person=b"quire front").hexdigest()
