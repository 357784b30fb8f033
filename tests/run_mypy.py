"""Type-check the package: mypy needs a folder named quire, and a checkout may have any name."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> int:
    """mypy's exit code; strict on engine and serving, plain on layers and kernels (mypy.ini)."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "quire").symlink_to(ROOT)
        packages = ("cpu_kernels", "engine", "layers", "pallas_kernels", "serving")
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "mypy.ini")]
        for package in packages:
            command += ["-p", f"quire.{package}"]
        environment = os.environ | {"MYPYPATH": folder}
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
