"""The notebooks of examples/ run from top to bottom and are stored without outputs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

#: steps that the notebooks leave to the presets
TRAININGS = {
    "factorkit.train_nerfdiff(views,": "search_steps=20",
    "factorkit.train_segdiff(photos,": "mixture_steps=20",
}
#: what most of such a short training would be: fields of the flip test, and the curves of reports
SHORTEN = """
from factorkit.nerfdiff.stages import stage_training
from factorkit.report import html
stage_training.HELD_OUT_STEPS = 6
html.draw_curves = lambda *arguments: []
"""
NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_in_the_repository_has_no_outputs(path):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert not [cell["id"] for cell in cells if cell["outputs"] or cell["execution_count"]]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_images(path, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("FACTORKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(path.parents[1]), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:  # the same calls, trained for fewer steps
        cell.source = re.sub(
            r"\b(\w*steps)=(\d\d\d?)\b", lambda match: f"{match[1]}={int(match[2]) // 10}", cell.source
        )
        for training, changes in TRAININGS.items():
            cell.source = cell.source.replace(training, f"{training} {changes},")
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SHORTEN))
    nbclient.NotebookClient(
        notebook, timeout=800, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
