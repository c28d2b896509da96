"""Which module may import which: the rooms of the package, lowest first, read from the sources; and what an import loads."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ms_diffusion as md

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ms_diffusion"
ROOMS = """
runtime versions progress fields files locks randomness
images plots2d mindir weight_files names
convert
kernels
schedules process losses
denoiser samplers editing likelihood
models
data
metrics
latent
sampling
training
commands
__init__ __main__
"""
LINE = {room: i for i, line in enumerate(ROOMS.strip().splitlines()) for room in line.split()}
# Dotted name in the package -> file; of a package, its __init__.py
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(source: str, package: str) -> list[tuple[str, bool]]:
    """(full name, whether at import time) of all that a module in this package imports, except for the type checker."""
    found = []

    def visit(node, at_import):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = [*parts[: len(parts) + 1 - node.level], node.module] if node.level else [node.module]
            found.extend((".".join(filter(None, [*base, alias.name])), at_import) for alias in node.names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, at_import and not inside)

    visit(ast.parse(source), True)
    return found


def module_of(name: str) -> str | None:
    """The module of the package that a full name lies in; None for names of other packages."""
    if name.split(".")[0] != "ms_diffusion":
        return None
    name = name.partition(".")[2]
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return name or "__init__"


def imports_of(module: str) -> list[tuple[str, bool]]:
    path = FILES[module]
    return imports(path.read_text(), ".".join(["ms_diffusion", *path.relative_to(PACKAGE).parent.parts]))


USES = {m: {module_of(name) for name, _ in imports_of(m)} - {None, m} for m in FILES}


def test_the_reader_of_imports():
    source = """
import a.b
from .c import d
from .. import e
def f():
    from ..g.h import i, j
if TYPE_CHECKING:
    from .k import l
if a:
    import m
"""
    assert imports(source, "top.sub") == [
        *[("a.b", True), ("top.sub.c.d", True), ("top.e", True)],
        *[("top.g.h.i", False), ("top.g.h.j", False), ("m", True)],
    ]
    assert module_of("ms_diffusion.models.unet.Unet") == "models.unet"
    assert module_of("ms_diffusion.data") == "data" and module_of("ms_diffusion.__version__") == "__init__"
    assert module_of("numpy.linalg") is None
    assert USES["denoiser"] == {"runtime", "process"} and "training.tasks.edits" in USES["training.tasks.images"]


def test_every_module_is_in_a_room():
    assert {module.split(".")[0] for module in FILES} == set(LINE)


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_from_its_own_line_and_those_above(module):
    line = LINE[module.split(".")[0]]
    below = [used for used in USES[module] if LINE[used.split(".")[0]] > line and used != "__init__"]
    assert not below
    assert "__init__" not in USES[module] or module == "__main__"


def test_there_is_no_circle():
    TopologicalSorter(USES).prepare()  # raises CycleError


@pytest.mark.parametrize("module", FILES)
def test_no_pickle_torch_only_on_request_and_network_in_two_modules(module):
    names = {name.split(".")[0] for name, _ in imports_of(module)}
    early = {name.split(".")[0] for name, at_import in imports_of(module) if at_import}
    assert not names & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    assert not names & {"train", "sample", "tests", "benchmarks"}
    assert not early & {"torch", "diffusers", "moxing", "requests", "socket"}
    assert module in ("data.fashion_mnist", "commands.app") or not names & {"urllib", "http", "requests", "socket", "ftplib"}


def test_no_module_asks_for_the_kind_of_a_run():
    flag, sources = re.compile(r"\bis_(points|latent|text|autoencoder)\b"), {m: p.read_text() for m, p in FILES.items()}
    assert not [module for module, text in sources.items() if flag.search(text)]
    assert not [module for module, text in sources.items() if module.startswith("models") and "ClassVar" in text]


# At run time


def python(code: str, *flags: str) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_the_package_alone_loads_next_to_nothing():
    heavy = "mindspore torch numpy matplotlib tyro pickle socket urllib.request".split()
    code = f"import sys; before = set(sys.modules); import ms_diffusion; print(set({heavy}) & set(sys.modules) - before)"
    assert python(code, "-W", "error").stdout == "set()\n"


def test_all_modules_load_without_network_and_torch_and_warn_once_of_mindspore_first():
    modules = [f"ms_diffusion.{module}" for module in FILES if not module.startswith("__")]
    code = f"""
import os, sys, socket, importlib, warnings
def refuse(*_): raise AssertionError("connects at import")
os.environ.pop("ONEDNN_MAX_CPU_ISA", None)
import mindspore
socket.socket.connect = socket.getaddrinfo = refuse
sys.modules["torch"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in {modules!r}:
        importlib.import_module(name)
print(*(warning.message for warning in caught), sep="\\n")
"""
    lines = python(code).stdout.splitlines()
    assert len(lines) == 1 and "import ms_diffusion first" in lines[0]


def test_public_names():
    assert len(md.__all__) == len(set(md.__all__)) > 100
    assert not [name for name in md.__all__ if getattr(md, name) is None or name not in dir(md)]
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        md.Nonsense  # noqa: B018
