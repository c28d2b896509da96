"""The notebooks run top to bottom, with a few steps of training and a few pictures, and are stored with their pictures."""

from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
WRITTEN = {  # the pictures of each
    "01_two_dimensions": ("forward.png", "score.png", "paths.png"),
    "02_fashion_mnist": ("data.png", "forward.png", "loss.png", "samples.png", "denoise.gif"),
    "03_sampling_and_editing": ("guidance.png", "samplers.png", "denoise.gif", "inpainted.png", "interpolated.png"),
}


def test_all_are_known():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(WRITTEN)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_runs_top_to_bottom(tmp_path, monkeypatch, name):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("NOTEBOOK_STEPS", "4")
    monkeypatch.setenv("NOTEBOOK_NUM", "10")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert not [o for cell in notebook.cells for o in cell.get("outputs", ()) if o.output_type == "error"]
    for picture in WRITTEN[name]:
        assert (tmp_path / picture).stat().st_size > 1000


@pytest.mark.parametrize("name", WRITTEN)
def test_is_stored_with_its_pictures(name):
    nbformat = pytest.importorskip("nbformat")
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    assert len(cells) <= 16
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert not any(output.output_type == "error" for output in outputs)
