"""The generated modules are those of the .proto files, field by field documented."""

import subprocess
import sys
from pathlib import Path

PROTOS = Path(__file__).parent.parent / "protos"


def test_generated_modules_are_up_to_date(tmp_path: Path) -> None:
    subprocess.run([sys.executable, PROTOS / "generate.py", tmp_path], check=True)
    made = {p.relative_to(tmp_path): p.read_text() for p in tmp_path.rglob("*_pb2*.py*")}
    there = {p.relative_to(PROTOS): p.read_text() for p in PROTOS.rglob("*_pb2*.py*")}
    assert made.keys() == there.keys(), "make protos"
    for name, text in made.items():
        assert text == there[name], f"{name} is old: make protos"
