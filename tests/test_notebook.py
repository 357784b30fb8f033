"""The notebook runs from its first cell to its last, and says what it promises."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


@pytest.mark.filterwarnings("default")  # the kernel's own machinery is not ours to mend
def test_the_quickstart_runs_and_answers() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    said = [printed(cell) for cell in cells]
    assert "What is 23 + 58? -> 23 + 58 = 81." in said[2]
    assert "The capital of France is Paris." in said[2]
    assert len(said[3]) > 60  # the story
    assert said[4].count("|") > 5  # its beginning again, in deltas
    assert said[4].replace("|", "") == said[3][: len(said[4].replace("|", ""))]
    assert any("image/png" in output.get("data", {}) for output in cells[6].outputs)
    num_right, _, num_asked, *_ = said[7].split()
    assert int(num_right) >= 0.95 * int(num_asked)
