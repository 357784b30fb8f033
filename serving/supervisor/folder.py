"""The private folder of one engine's sockets."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ...engine.errors import ConfigError

# What the kernel's sockaddr_un holds, its final zero left out; macOS has 103.
_MAX_SOCKET_BYTES = 103
_LONGEST_NAME = "gateway.sock"


@contextmanager
def private_folder(environment: Mapping[str, str] = os.environ) -> Iterator[Path]:
    """A fresh folder that only this user can enter, under $XDG_RUNTIME_DIR, else the temporary
    folder; removed at the end. Raises ConfigError.
    """
    given = environment.get("XDG_RUNTIME_DIR")
    base = Path(given or tempfile.gettempdir())
    if given and not os.access(base, os.W_OK | os.X_OK):
        base = Path(tempfile.gettempdir())
    try:
        folder = Path(tempfile.mkdtemp(prefix="quire-", dir=base))  # mode 0700
    except OSError as error:
        raise ConfigError(
            f"no folder for the engine's sockets can be made in {base} ({error.strerror}); set "
            "XDG_RUNTIME_DIR to a folder that you can write to"
        ) from error
    try:
        num_bytes = len(os.fsencode(folder / _LONGEST_NAME))
        if num_bytes > _MAX_SOCKET_BYTES:
            raise ConfigError(
                f"the engine's sockets would be in {folder}: {num_bytes} bytes, and the path of a "
                f"socket may have {_MAX_SOCKET_BYTES}; set XDG_RUNTIME_DIR to a shorter folder"
            )
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
