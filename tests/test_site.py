"""The documentation site: names in its pages exist, and it builds without warnings and without anything from elsewhere."""

import importlib
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import ms_diffusion as md

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ms_diffusion"
NAMED = [path for name in ("tour", "mathematics") for path in ROOT.glob(f"docs/**/{name}.md")]
MODULES = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


def find(name: str) -> object:
    """What a dotted name in ms_diffusion stands for; AttributeError if nothing."""
    value, parts = md, name.split(".")
    while parts and find_spec(f"{value.__name__}.{parts[0]}"):
        value = importlib.import_module(f"{value.__name__}.{parts.pop(0)}")
        if not hasattr(value, "__path__"):
            break
    for part in parts:
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("page", NAMED, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_the_functions_and_files_that_are_named_exist(page):
    code = re.findall(r"`([A-Za-z_][\w./]*)`", page.read_text())
    names = [name for name in code if name.split(".")[0] in MODULES and "." in name and not name.endswith(".py")]
    files = [name for name in code if name.endswith((".py", "/"))]
    assert len(names) > 50
    assert not [name for name in names if find(name) is None]
    assert not [name for name in files if not (ROOT / name).exists()]
    with pytest.raises(AttributeError):
        find("process.Process.q_simple")


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"^\* \[[^]]+\]\(([^)]+)\)", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    pages = {path.resolve() for pattern in ("*.md", "docs/*.md", "docs/zh/*.md") for path in ROOT.glob(pattern)}
    assert len(listed) == len(set(listed))
    assert {(ROOT / "docs" / page).resolve() for page in listed} == pages - {ROOT / "README.md", ROOT / "docs" / "index.md"}


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path):
    for package in ("sphinx", "myst_parser", "furo", "latex2mathml"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-c", "docs", ".", tmp_path / "site"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "-d", tmp_path / "doctrees"], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {str(path.relative_to(tmp_path / "site")): path.read_text() for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "docs/mathematics.html", "docs/reference/samplers.html"} <= set(pages)

    text = "".join(pages.values())
    assert not [name for name in md.__all__ if f'id="ms_diffusion.{name}"' not in text]
    assert "$" not in re.sub(r"<(script|pre|code)\b.*?</\1>", "", pages["docs/mathematics.html"], flags=re.DOTALL)

    loads = r"<(?:script|img|iframe|source|link|video)\b[^>]*?\b(?:src|href|srcset)=|@import\s*|url\("
    outside = rf"""(?:{loads})\s*["']?\s*(?:https?:)?//"""
    styles = [path.read_text() for path in (tmp_path / "site").rglob("*.css")]
    assert not [found for each in [*pages.values(), *styles] for found in re.findall(outside, each)]


@pytest.mark.slow
def test_the_recipes_run(tmp_path):
    blocks = re.findall(
        r"^```(bash|python)\n(.*?)^```", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) > 10
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f'ms-diffusion() {{ {sys.executable} -m ms_diffusion "$@"; }}\n'
    for i, (language, text) in enumerate(blocks):
        name = tmp_path / f"{i}.{language}"
        name.write_text(command + text if language == "bash" else text)
        program = ["bash", "-eu"] if language == "bash" else [sys.executable]
        done = subprocess.run([*program, name], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, f"{text}\n{done.stderr}"
