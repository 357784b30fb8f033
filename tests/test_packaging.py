"""The wheel has every package, files stay readable, and the folders are what the list says."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cpu_kernels", "engine", "layers", "pallas_kernels", "protos", "serving")
MAX_FILE_LINES, MAX_MODEL_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 300, 80, 6


def sources(*folders: str) -> list[Path]:
    found = [p for f in folders for p in (ROOT / f).rglob("*.py")]
    return [p for p in found if not p.name.endswith(("_pb2.py", "_pb2_grpc.py"))]


def test_wheel_list_names_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {
        p.parent.relative_to(ROOT) for f in PACKAGES for p in (ROOT / f).rglob("__init__.py")
    }
    expected = {"quire", *(".".join(("quire", *folder.parts)) for folder in folders)}
    assert set(project["tool"]["setuptools"]["packages"]) == expected
    lost = {
        p.parent.relative_to(ROOT)
        for p in sources(*PACKAGES)
        if not (p.parent / "__init__.py").is_file()
    }
    assert not lost


def test_root_holds_one_module() -> None:
    assert [p.name for p in ROOT.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("path", sources(*PACKAGES, "tests", "bench", "demo"), ids=str)
def test_file_and_function_lengths(path: Path) -> None:
    text = path.read_text()
    is_model = path.parent == ROOT / "layers" / "models" and "def read_config(" in text
    assert text.count("\n") <= (MAX_MODEL_FILE_LINES if is_model else MAX_FILE_LINES)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


@pytest.mark.parametrize("path", [*(ROOT / "examples").glob("*/package-lock.json")], ids=str)
def test_locked_packages_come_from_whatever_registry_npm_is_told(path: Path) -> None:
    """As `npm install --omit-lockfile-registry-resolved` writes it."""
    packages = json.loads(path.read_text())["packages"]
    del packages[""]
    assert packages
    for name, package in packages.items():
        assert "resolved" not in package, name
        assert package["integrity"], name


def test_importing_the_package_loads_no_jax() -> None:
    code = (
        "import sys, quire, quire.serving.cli, quire.engine.config, quire.engine.text.tokenizer\n"
        "import quire.engine.request, quire.engine.metrics, quire.engine.errors\n"
        "assert not {'jax', 'flax', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)
