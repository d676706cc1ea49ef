"""The notebooks in examples/: they run from top to bottom on a CPU, and are committed without outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.small_run import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_has_no_outputs_and_no_broken_links(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert any(cell["cell_type"] == "code" for cell in cells)
    for cell in cells:
        text = "".join(cell["source"])
        assert not cell.get("outputs") and cell.get("execution_count") is None
        if cell["cell_type"] == "markdown":
            assert all((path.parent / target).exists() for target in re.findall(r"\]\(([^):]+)\)", text))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("nbclient", "nbformat", "ipykernel", "transformers", "matplotlib"):
        pytest.importorskip(package, reason="pip install -e '.[train,plot,notebook]' to run notebooks")
    import nbclient
    import nbformat

    monkeypatch.setenv("QGALORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "perplexity on held-out text" in printed and "60 of 60 updates are made already" in printed
    assert re.search(r"loss on two sentences: [\d.]+ -> [\d.]+", printed)
