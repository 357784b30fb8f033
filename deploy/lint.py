"""Checks each file of this folder with the linter of its kind. `make check-deploy` runs it."""

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import crossplane

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
YAML_RULES = """extends: default
rules:
  line-length: {max: 100}
"""


def main() -> int:
    """How many checks failed."""
    failed = [check.__name__ for check in CHECKS if not check()]
    print(f"deploy: {', '.join(failed)} failed" if failed else "deploy: all files are well formed")
    return len(failed)


def yaml() -> bool:
    return succeeds(BIN / "yamllint", "--strict", "-d", YAML_RULES, HERE)


def dockerfile() -> bool:
    return succeeds(BIN / "hadolint", HERE / "Dockerfile")


def kubernetes() -> bool:
    # Kustomizations are no objects of a cluster, and have no schema there.
    manifests = [p for p in HERE.glob("kubernetes/*/*.yaml") if p.name != "kustomization.yaml"]
    return succeeds(BIN / "kubernetes-validate", "--strict", "--quiet", *manifests)


def nginx() -> bool:
    with TemporaryDirectory() as folder:
        # The file is a site: what stands around it is that of every nginx.
        whole = Path(folder) / "nginx.conf"
        whole.write_text(f"events {{}}\nhttp {{ include '{HERE / 'nginx.conf'}'; }}\n")
        loose = crossplane.parse(str(whole))
        # The lines of a map are values, which crossplane takes for unknown directives.
        values = {line for file in loose["config"] for line in lines_in_maps(file["parsed"])}
        found = crossplane.parse(str(whole), strict=True)["errors"]
    errors = [error["error"] for error in found if error["line"] not in values]
    print(*errors, sep="\n", end="\n" if errors else "")
    return not errors


def systemd() -> bool:
    if shutil.which("systemd-analyze") is None:
        print("quire.service is not verified: there is no systemd-analyze here")
        return True
    with TemporaryDirectory() as folder:
        # What it starts has to be there.
        unit = (HERE / "quire.service").read_text()
        there = Path(folder) / "quire.service"
        there.write_text(unit.replace("/opt/quire/bin/quire", sys.executable))
        command = ["systemd-analyze", "verify", "--man=no", str(there)]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    # It has faults of other units too, and unknown keys are no failure to it.
    faults = [line for line in said.splitlines() if there.name in line]
    print(*faults, sep="\n", end="\n" if faults else "")
    return not faults


CHECKS = (yaml, dockerfile, kubernetes, nginx, systemd)


def lines_in_maps(block: list[Any]) -> list[int]:
    found = []
    for directive in block:
        inner = directive.get("block", [])
        if directive["directive"] == "map":
            found += [one["line"] for one in inner]
        found += lines_in_maps(inner)
    return found


def succeeds(*command: str | Path) -> bool:
    return subprocess.run([str(part) for part in command], check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
