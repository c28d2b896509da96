"""The wheel, installed outside the repository, trains, samples and evaluates."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(folder of an environment's programs, an empty folder); of other packages it sees those that run the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    source, environment, empty = folder / "source", folder / "venv", folder / "empty"
    shutil.copytree(ROOT / "ms_diffusion", source / "ms_diffusion", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, source], check=True)
    venv.create(environment)
    programs = environment / "bin"
    (site,) = environment.glob("lib/*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    (wheel,) = folder.glob("ms_diffusion-*.whl")
    subprocess.run([*pip, "--python", programs / "python", "install", "--no-deps", "--no-index", wheel], check=True)
    empty.mkdir()
    return programs, empty


def run(installed, *command):
    programs, folder = installed
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [programs / command[0], *command[1:]], cwd=folder, env=environ, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_readmes_commands_work(installed):
    folder = installed[1]
    small = "--train.total-steps 2 --train.log-every 1 --train.sample-num 4 --train.sample-steps 2".split()
    run(installed, "ms-diffusion", "train", "--preset", "quick", "--run-dir", "runs/quick", *small)
    run(installed, "ms-diffusion", "sample", "runs/quick", "--num", "4", "--steps", "2", "--out", "grid.png")
    run(installed, "ms-diffusion", "sample", "--num", "4", "--steps", "2", "--out", "bundled.png")
    report = ["--json", "scores.json", "--out", "scores.png"]
    run(installed, "ms-diffusion", "evaluate", "runs/quick", "--num", "200", "--steps", "2", *report)
    assert {path.name for path in folder.iterdir()} >= {"runs", "grid.png", "bundled.png", "scores.json", "scores.png"}
    assert "fashion-mnist-large" in run(installed, "python", "-m", "ms_diffusion", "sample", "--list")


def test_public_names_and_files_are_there(installed):
    code = (
        "import ms_diffusion as md; from pathlib import Path; home = Path(md.__file__).parent; print(home)\n"
        "assert all(getattr(md, name) for name in md.__all__)\n"
        "assert (home / 'py.typed').exists()\n"
        "from ms_diffusion import kernels; print('library:', kernels.library())"
    )
    home, *_, library = run(installed, "python", "-c", code).splitlines()
    assert home == str(next(installed[0].parent.glob("lib/*/site-packages")) / "ms_diffusion")
    assert library.endswith(".so")
