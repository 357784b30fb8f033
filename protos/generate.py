"""Writes the Python modules of the .proto files beside them: `make protos`. With --check it only
says whether they are up to date, which `make check` does.

The virtual path makes generated imports right: the folder `protos` is the package `quire.protos`.
"""

import sys
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from grpc_tools import protoc

HERE = Path(__file__).parent


def generate(target: Path) -> None:
    """Write `target/quire/…/*_pb2*.py` for every .proto file."""
    names = [path.relative_to(HERE).as_posix() for path in sorted(HERE.rglob("*.proto"))]
    with TemporaryDirectory() as made:
        code = protoc.main(
            [
                "protoc",
                f"-Iquire/protos={HERE}",
                f"-I{files('grpc_tools') / '_proto'}",
                f"--python_out={made}",
                f"--pyi_out={made}",
                f"--grpc_python_out={made}",
                *(f"quire/protos/{name}" for name in names),
            ]
        )
        if code:
            raise SystemExit(f"protoc ended with exit code {code}")
        root = Path(made) / "quire" / "protos"
        for file in sorted(root.rglob("*_pb2*.py*")):
            if file.name.endswith("_pb2_grpc.py") and "add_" not in file.read_text():
                continue  # a file without a service
            goal = target / file.relative_to(root)
            goal.parent.mkdir(parents=True, exist_ok=True)
            goal.write_text(file.read_text())


def old_modules() -> list[str]:
    """Modules that are not what generate() would write."""
    with TemporaryDirectory() as folder:
        generate(Path(folder))
        made = _texts(Path(folder))
    there = _texts(HERE)
    return sorted(name for name in made | there if made.get(name) != there.get(name))


def _texts(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): p.read_text() for p in root.rglob("*_pb2*.py*")}


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        if old := old_modules():
            sys.exit(f"not up to date: {', '.join(old)}; run make protos")
    else:
        generate(HERE)
