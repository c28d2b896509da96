"""The notebooks run top to bottom, with a few steps of training and a few pictures, and are stored with their pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
WRITTEN = {  # the pictures of each
    "01_two_dimensions": ("forward.png", "score.png", "paths.png"),
    "02_fashion_mnist": ("data.png", "forward.png", "loss.png", "samples.png", "denoise.gif"),
    "03_sampling_and_editing": ("guidance.png", "samplers.png", "denoise.gif", "inpainted.png", "interpolated.png"),
    "04_latent_captions": ("latents.png", "between.png", "samples.png", "denoise.gif"),
    "05_modelarts": ("samples.png", "modelarts/obs/out/loss.png"),
    "06_own_pictures": ("data.png", "samples.png", "own.png", "tuned.png"),
}


def test_all_are_known():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(WRITTEN)


def make_emoji(folder):
    """Pictures with captions in place of the emoji, which npm would fetch."""
    folder.mkdir(parents=True)
    lines = [{"file_name": f"{i}.png", "text": [f"face {i}", "face"], "label": "Smileys & Emotion"} for i in range(90)]
    for i, line in enumerate(lines):
        noise = np.random.default_rng(i).integers(0, 256, (64, 64, 4), np.uint8)
        Image.fromarray(noise).save(folder / line["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_runs_top_to_bottom(tmp_path, monkeypatch, name):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("NOTEBOOK_STEPS", "4")
    monkeypatch.setenv("NOTEBOOK_NUM", "10")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    make_emoji(tmp_path / "data/emoji")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert not [o for cell in notebook.cells for o in cell.get("outputs", ()) if o.output_type == "error"]
    for picture in WRITTEN[name]:
        assert (tmp_path / picture).stat().st_size > 1000


@pytest.mark.parametrize("name", WRITTEN)
def test_is_stored_with_its_pictures(name):
    nbformat = pytest.importorskip("nbformat")
    path = NOTEBOOKS / f"{name}.ipynb"
    assert path.stat().st_size < 2_000_000
    cells = nbformat.read(path, as_version=4).cells
    assert len(cells) <= 16
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert not any(output.output_type == "error" for output in outputs)
