"""What servers that ask for certificates and keys are started with, and their callers show."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

import grpc

from .engines import Client

KEY = "sesame"


@dataclass(frozen=True)
class Files:
    """Certificates of one authority, and of another that nobody trusts."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> "Files":
        files = cls(folder)
        for authority in ("ours", "other"):
            files._openssl(authority, "-x509", "-subj", f"/CN={authority}")
            for name in ("server", "client"):
                files._openssl(
                    f"{authority}-{name}",
                    *("-x509", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"),
                    *("-CA", files.path(authority, "pem"), "-CAkey", files.path(authority, "key")),
                )
        (folder / "keys").write_text(f"# of the tests\n{KEY}\n")
        return files

    def path(self, name: str, kind: str) -> str:
        return str(self.folder / f"{name}.{kind}")

    def bytes_of(self, name: str, kind: str) -> bytes:
        return Path(self.path(name, kind)).read_bytes()

    def credentials(self, trusts: str, shows: str | None) -> grpc.ChannelCredentials:
        authorities = self.bytes_of(trusts, "pem")
        if shows is None:
            return grpc.ssl_channel_credentials(authorities)
        pair = self.bytes_of(shows, "key"), self.bytes_of(shows, "pem")
        return grpc.ssl_channel_credentials(authorities, *pair)

    def flags(self) -> list[str]:
        """Of a server that wants a key of its callers, and certificates on both sides."""
        given = {
            "--api-key-file": str(self.folder / "keys"),
            "--ssl-certfile": self.path("ours-server", "pem"),
            "--ssl-keyfile": self.path("ours-server", "key"),
            "--ssl-ca-certs": self.path("ours", "pem"),
        }
        return [part for flag in given.items() for part in flag]

    def connect(self, address: str) -> Client:
        """To such a server."""
        return Client(address, credentials=self.credentials("ours", "ours-client"), key=KEY)

    def _openssl(self, name: str, *more: str) -> None:
        kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        out = ("-keyout", self.path(name, "key"), "-out", self.path(name, "pem"))
        command = ["openssl", "req", *kind, *out, "-days", "2", *more]
        subprocess.run(command, check=True, capture_output=True)
