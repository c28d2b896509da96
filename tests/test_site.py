"""The documentation site: names in its pages exist, and it builds without warnings and without anything from elsewhere."""

import importlib
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
