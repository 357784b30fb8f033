"""buf lint, which needs the virtual path that generate.py gives protoc. `make check` runs it."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
# The package is quire.v1 while the folder is quire/protos/quire/v1; services and messages have the
# names that users read, not those of a generator.
RULES = """version: v2
lint:
  use: [STANDARD]
  except:
    - PACKAGE_DIRECTORY_MATCH
    - RPC_REQUEST_RESPONSE_UNIQUE
    - RPC_REQUEST_STANDARD_NAME
    - RPC_RESPONSE_STANDARD_NAME
    - SERVICE_SUFFIX
"""


def main() -> int:
    """buf's exit code."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "quire").mkdir()
        (Path(folder) / "quire" / "protos").symlink_to(HERE)
        (Path(folder) / "buf.yaml").write_text(RULES)
        buf = Path(sys.executable).parent / "buf"
        return subprocess.run([str(buf), "lint"], cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
