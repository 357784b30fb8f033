"""Documents say what the code says."""

import re
from pathlib import Path

import pytest
from quire.serving.options_page import page

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def test_options_page_is_what_the_config_generates() -> None:
    assert (ROOT / "docs" / "options.md").read_text() == page()


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_files_that_a_page_names_exist(path: Path) -> None:
    text = path.read_text()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    named = re.findall(
        r"`((?:engine|layers|pallas_kernels|serving|bench|docs|tests)/[\w/.-]+)`", text
    )
    assert links or named or path.name == "CHANGELOG.md"
    for name in (*links, *named):
        assert (path.parent / name).exists() or (ROOT / name).exists(), name


def test_snippets_of_clients_are_parts_of_the_files_that_run() -> None:
    snippets = {}
    for section in (ROOT / "docs" / "clients.md").read_text().split("\n## ")[1:]:
        (name,) = re.findall(r"\]\(\.\./examples/clients/([\w.]+)\)", section)
        (snippets[name],) = re.findall(r"```\w+\n(.*?)```", section, re.DOTALL)
    folder = ROOT / "examples" / "clients"
    assert set(snippets) == {f.name for f in folder.iterdir() if f.suffix in (".py", ".mjs", ".sh")}
    for name, snippet in snippets.items():
        assert snippet in (folder / name).read_text(), name
