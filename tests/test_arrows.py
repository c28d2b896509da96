"""The arrows between the modules (A -> B: B uses A) run one way; what each file imports is read from its source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ms_diffusion

ROOT = Path(__file__).parents[1]
PACKAGE = "ms_diffusion"
FILES = {}  # "models.unet" -> its file; "" is the package itself
for file in sorted((ROOT / PACKAGE).rglob("*.py")):
    FILES[".".join(file.relative_to(ROOT / PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")] = file

# All that these use of the package
ALLOWED = {
    "runtime": set(),
    "schedules": set(),
    "losses": set(),
    "diffusion": {"runtime", "schedules", "losses"},
    "denoiser": {"runtime", "diffusion"},
    "samplers": {"runtime"},  # a denoiser is an argument
    "editing": {"runtime", "samplers"},
    "likelihood": {"runtime", "diffusion", "denoiser", "cli", "presets", "data.pipeline"},
    "generation": {"runtime", "denoiser", "samplers", "data.captions"},
    "latent": {"runtime", "images", "models.autoencoder"},
    "draws": set(),
    "features": {"runtime", "images", "models.classifier", "models.inception"},
    "evaluation": set(),
    "plane": {"runtime", "images"},
    "data.toy": {"runtime"},
    "data.captions": {"runtime"},
    "kernels": set(),
    "training": {"runtime", "kernels"},
    "convert": {"runtime"},
    "checkpoint": {"runtime", "convert"},
    "images": {"runtime"},
    "modelarts": {"runtime"},
    "cli": {"runtime", "modelarts"},
    "models.layers": {"runtime", "kernels"},
    "models.attention": {"runtime", "kernels", "models.layers"},
    "models.unet": {"runtime", "models.layers", "models.attention"},
    "models.mlp": {"runtime", "models.layers"},
    "models.classifier": {"runtime", "convert", "models.layers"},
    "models.inception": {"runtime", "convert"},
    "models.lpips": {"runtime", "convert", "models.layers", "models.classifier"},
    "models.discriminator": {"models.layers"},
    "models.autoencoder": {"models.layers", "models.attention"},
    "models.unet_ldm": {"models.layers", "models.attention"},
    "models.context": {"models.layers", "models.unet_ldm"},
}
DIFFUSION = {"schedules", "diffusion", "denoiser", "samplers"}
MEETING = {"presets", "cli", "train", "sample"}  # the top, where all meet


def imports(file: Path, package: str) -> list[tuple[str, bool]]:
    """(what is imported, in full; whether at import time) for each import of a file whose package has this name."""
    found = []

    def visit(node, at_import):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                parts = package.split(".")[: len(package.split(".")) + 1 - child.level] if child.level else []
                base = ".".join([*parts, *([child.module] if child.module else [])])
                found.extend((f"{base}.{alias.name}", at_import) for alias in child.names)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            visit(child, at_import and not inside)

    visit(ast.parse(file.read_text()), True)
    return found


def home(name: str) -> str | None:
    """The module of the package that an imported name lies in, None for those of others."""
    if name.split(".")[0] != PACKAGE:
        return None
    rest = name.removeprefix(PACKAGE).removeprefix(".")
    rest = f"{ms_diffusion._HOME_OF[rest]}.{rest}" if rest in ms_diffusion._HOME_OF else rest
    while rest not in FILES:
        rest = rest.rpartition(".")[0]
    return rest


def imports_of(module: str) -> list[tuple[str, bool]]:
    file = FILES[module]
    parent = module if file.name == "__init__.py" else module.rpartition(".")[0]
    return imports(file, f"{PACKAGE}.{parent}".rstrip("."))


USES = {module: {home(name) for name, _ in imports_of(module)} - {None, ""} for module in FILES}


def reaches(module: str) -> set[str]:
    """All modules that this one uses, directly or through others."""
    seen, queue = set(), [module]
    while queue:
        new = USES[queue.pop()] - seen
        seen |= new
        queue += new
    return seen


def is_model(module):
    return module.startswith("models.")


def test_the_reader_of_imports(tmp_path):
    source = "import a.b\nfrom .c import d\nfrom .. import e\ndef f():\n    from ..g.h import i, j\nif a:\n    import k\n"
    (tmp_path / "m.py").write_text(source)
    assert imports(tmp_path / "m.py", "top.sub") == [
        *[("a.b", True), ("top.sub.c.d", True), ("top.e", True)],
        *[("top.g.h.i", False), ("top.g.h.j", False), ("k", True)],
    ]
    assert home("ms_diffusion.models.unet.Unet") == home("ms_diffusion.Unet") == "models.unet"
    assert home("numpy.linalg") is None
    assert {"runtime", "diffusion"} <= USES["denoiser"] and "schedules" in reaches("denoiser")


@pytest.mark.parametrize("module", ALLOWED)
def test_the_arrows(module):
    assert USES[module] <= ALLOWED[module]


@pytest.mark.parametrize("module", [m for m in FILES if is_model(m)])
def test_a_model_knows_neither_diffusion_nor_training(module):
    assert not reaches(module) & (DIFFUSION | MEETING | {"training", "checkpoint"})


@pytest.mark.parametrize("module", ["training", "checkpoint", *sorted(DIFFUSION)])
def test_neither_training_nor_diffusion_knows_a_model(module):
    others = DIFFUSION if module in ("training", "checkpoint") else {"training", "checkpoint"}
    assert not reaches(module) & (others | MEETING)
    assert not [m for m in USES[module] if is_model(m)]


@pytest.mark.parametrize("module", FILES)
def test_no_module_uses_itself_in_a_circle(module):
    assert module not in reaches(module)


@pytest.mark.parametrize("module", FILES)
def test_no_module_uses_a_program(module):
    assert not {name.split(".")[0] for name, _ in imports_of(module)} & {"train", "sample", "tests"}


@pytest.mark.parametrize("module", [m for m in FILES if m != "torch_peer"])  # which only the benchmark asks for
def test_no_pickle_and_no_torch_but_on_request(module):
    names = {name.split(".")[0] for name, _ in imports_of(module)}
    assert not names & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    at_import = {name.split(".")[0] for name, early in imports_of(module) if early}
    assert not at_import & {"torch", "diffusers", "moxing", "gradio", "requests", "socket"}
    if module != "data.fashion_mnist":  # the one that downloads
        assert not names & {"urllib", "http", "requests", "socket", "ftplib"}


# At run time


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_alone_loads_next_to_nothing():
    heavy = "mindspore torch numpy matplotlib tyro pickle socket urllib.request"
    code = (
        f"import sys; before = set(sys.modules); import {PACKAGE}; print(set({heavy.split()}) & set(sys.modules) - before)"
    )
    assert python(code) == "set()\n"


def test_all_modules_load_without_the_network_and_without_torch():
    modules = [f"{PACKAGE}.{m}" for m in FILES if m and m != "torch_peer"]
    code = f"""
import sys, socket, importlib
def refuse(*_): raise AssertionError("connects at import")
import ms_diffusion.runtime, mindspore
socket.socket.connect = socket.getaddrinfo = refuse
sys.modules["torch"] = None
for name in {modules!r}:
    importlib.import_module(name)
"""
    python(code)


@pytest.mark.parametrize("name", ms_diffusion.__all__)
def test_public_names(name):
    assert getattr(ms_diffusion, name) is not None
    assert name in dir(ms_diffusion)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        ms_diffusion.Nonsense  # noqa: B018
