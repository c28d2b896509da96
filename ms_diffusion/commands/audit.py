"""List the primitives of a preset's graphs and how each device runs them: `audit --preset quick`.

The graphs are compiled on the CPU, without this library's CPU kernels, as they are for Ascend and GPU. Which primitives
these two have is read from the installed MindSpore: its libraries, its tables of operators, and its documentation."""

import ctypes
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import mindspore as ms
from mindspore import ops

from .. import kernels
from ..data.batches import random_images
from ..fields import OneOf, check_fields
from ..files import temporary_folder
from ..runtime import command, set_device
from ..sampling import Sampling
from ..training.checkpoint import Checkpoint
from ..training.presets import PRESETS
from ..training.step import EMA
from .parse import parse

LIBRARIES = Path(ms.__file__).parent / "lib"
STRUCTURE = {"TupleGetItem", "MakeTuple", "Load", "UpdateState", "Depend", "Return", "Partial", "Switch", "call"}
VIEWS = {"Reshape", "ExpandDims", "Squeeze", "Flatten"}  # they move no data
MEANINGS = {
    "aclnn": "a launch through CANN's aclnn interface",
    "aclop": "a launch through CANN's older and slower aclop interface",
    "kernel": "a kernel of MindSpore",
    "rewritten": "replaced by other primitives before kernels are chosen",
    "view": "no launch",
    "missing": "no kernel: the graph fails on this device",
    "unknown": "the installed MindSpore does not say",
}


@dataclass
class Args:
    """List the primitives of a preset's training and sampling graphs, and how Ascend, GPU and CPU run each of them.

    Nothing but a CPU is needed. The exit code is 1 if a device lacks a primitive."""

    preset: Annotated[str, OneOf(PRESETS)] = "quick"
    """The preset whose graphs are compiled."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Graphs:
    """What the compiler made of some graphs: how often each primitive occurs, those that are left when kernels are chosen,
    and those for which the CPU has none."""

    primitives: Counter
    kernels: set[str]
    failed: set[str]


def main(argv: Sequence[str]) -> int:
    args = parse(Args, argv, prog=command("audit"))
    check_fields(args)
    set_device("cpu")
    with dumped_graphs() as folder, kernels.disabled():
        train, draw = prepare(args.preset, folder)
        graphs = {"training": compile_graphs(train, folder), "sampling": compile_graphs(draw, folder)}
    rows = table(list(graphs.values()))
    print(f"{'primitive':28}{'training':>9}{'sampling':>9}  {'Ascend':10}{'GPU':10}CPU")
    for name, ways in rows.items():
        counts = "".join(f"{each.primitives[name]:9}" for each in graphs.values())
        print(f"{name:28}{counts}  {ways[0]:10}{ways[1]:10}{ways[2]}")
    used = {way for ways in rows.values() for way in ways}
    print(f"\n{args.preset}, MindSpore {ms.__version__}; numbers of nodes in the graphs")
    print("\n".join(f"{way:10}{text}" for way, text in MEANINGS.items() if way in used))
    return int("missing" in used)


@contextmanager
def dumped_graphs() -> Iterator[Path]:
    """A temporary folder into which the compiler writes all graphs, if none was compiled before: MindSpore reads these
    settings once. The folder is also the current one, because the compiler writes beside what is asked for."""
    here, before = Path.cwd(), dict(os.environ)
    with temporary_folder() as folder:
        os.environ |= {
            "MS_DEV_SAVE_GRAPHS": "1",
            "MS_DEV_SAVE_GRAPHS_PATH": str(folder),
            "MS_DEV_DUMP_IR_PASSES": "validate,graph_build",
        }
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(here)
            os.environ.clear()
            os.environ |= before


def prepare(preset: str, folder: Path) -> tuple[Callable, Callable]:
    """(train, draw) of a preset, on two random images: calls of all its compiled functions."""
    config: Any = PRESETS[preset]
    config = replace(config, train=replace(config.train, batch_size=2))
    data: Any = None
    if hasattr(config.data, "size"):
        data = random_images(2, config.data.size, config.model.channels)
    if hasattr(config, "first_stage"):
        config = replace(config, first_stage=str(untrained(PRESETS["autoencoder"], folder / "stage")), latent_scale=1.0)
    task = config.task(data)
    task.start(folder / "run")

    def train() -> None:
        batch, late = next(task.batches()), getattr(config.train, "disc_start", 0)
        for step in sorted({0, late}):
            task.advance(batch, step)

    def draw() -> None:
        if hasattr(task, "draw"):
            task.draw(2, Sampling(steps=1), 2)
        else:
            task.average.reconstruct(data.images)

    return train, draw


def untrained(config: Any, run: Path) -> Path:
    """The folder of a run with its initial weights."""
    net = config.task().build()[0]
    Checkpoint(run, net, ema=EMA(net)).save(0)
    (run / "config.json").write_text(json.dumps(config.to_record()))
    return run


def compile_graphs(call: Callable, folder: Path) -> Graphs:
    """The graphs that the call compiles, from the folder of `dumped_graphs`."""
    before, failed = set(folder.rglob("*.ir")), set()
    try:
        call()
    except RuntimeError as e:
        failed = set(re.findall(r"Unsupported op \[(\w+)\] on CPU", str(e)))
        if not failed:
            raise
    new = set(folder.rglob("*.ir")) - before
    front, back = (sum((count(f) for f in new if kind in f.name), Counter()) for kind in ("validate", "graph_build"))
    return Graphs(front, set(back), failed)


def count(file: Path) -> Counter:
    """How often each primitive occurs in a dumped graph, without the function that reports the end of a graph on the CPU."""
    lines = (line for line in file.read_text(errors="replace").splitlines() if 'func_name: "set_done"' not in line)
    found = (re.match(r"\s*%\S+ = (?:PrimFunc_)?(?:\w+::)?(\w+)\(", line) for line in lines)
    return Counter(match[1] for match in found if match and match[1] not in STRUCTURE)


def table(graphs: list[Graphs]) -> dict[str, tuple[str, str, str]]:
    """For each primitive, how Ascend, GPU and CPU run it: words of `MEANINGS`."""
    rows = {}
    for name in sorted(set().union(*(each.primitives for each in graphs))):
        with_it = [each for each in graphs if name in each.primitives]
        cpu = "missing"
        if not any(name in each.failed for each in with_it):
            compiled = [each for each in with_it if not each.failed]
            cpu = "kernel" if any(name in each.kernels for each in compiled) else "rewritten"
            cpu = cpu if compiled else documented(name, "CPU") or "unknown"
        rows[name] = on_ascend(name), on_gpu(name, cpu == "rewritten"), cpu
    return rows


def on_ascend(name: str) -> str:
    """As MindSpore chooses for a graph at level O0: aclnn if the operator's table allows it and there is a class for it,
    otherwise the adapter of the operator for aclop."""
    if name in VIEWS:
        return "view"
    allowed = dispatches_to_aclnn(name)
    if allowed is not False and name.lower() in aclnn_classes():
        return "aclnn" if allowed else "unknown"
    known = documented(name, "Ascend")
    return ("aclop" if known == "kernel" else known) or ("aclop" if is_named(name, "ascend") else "unknown")


def on_gpu(name: str, rewritten: bool) -> str:
    """`rewritten`: whether the passes before the choice of kernels, which CPU and GPU share, replace the primitive."""
    named = is_named(name, "gpu") or f"{name}GpuKernelMod".encode() in device_libraries("gpu")
    known = documented(name, "GPU") or ("kernel" if named else None)
    if rewritten and known != "kernel":
        return "rewritten"
    return known or "unknown"


def documented(name: str, device: str) -> str | None:
    """ "kernel" if the documentation of a primitive names the device, "missing" if only others, None if it names none."""
    from mindspore.ops import auto_generate, operations

    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    texts = [getattr(getattr(home, name, None), "__doc__", None) or "" for home in (operations, auto_generate)]
    functions = [*re.findall(r":func:`mindspore\.(?:ops|mint)\.(\w+)`", "".join(texts))[:1], snake]
    texts += [getattr(getattr(ops, function, None), "__doc__", None) or "" for function in functions]
    for text in texts:
        if platforms := re.findall(r"``(\w+)``", (re.search(r"Supported Platforms:\s*\n(.*)", text) or [""])[0]):
            return "kernel" if device in platforms else "missing"
    return None


@cache
def device_libraries(device: str) -> bytes:
    """The libraries of a device, "ascend" or "gpu", one after the other."""
    files = [path for path in sorted((LIBRARIES / "plugin").rglob("libmindspore_*.so*")) if device in str(path)]
    return b"".join(path.read_bytes() for path in files)


def is_named(name: str, device: str) -> bool:
    """Whether a text in the device's libraries is this name: evidence for operators that are not documented."""
    return b"\0" + name.encode() + b"\0" in device_libraries(device)


@cache
def aclnn_classes() -> set[str]:
    """The names in lower case of the primitives for whose nodes in a graph there is a class that launches aclnn: the class's
    or its namespace's, such as mindspore::kernel::batch_matmul::BMMAclnnKernelMod."""
    found = set()
    for match in re.finditer(rb"\0N9mindspore6kernel((?:\d+\w+)+?)\0", device_libraries("ascend")):
        rest, names = match[1].decode(), []
        while length := re.match(r"\d+", rest):
            end = length.end() + int(length[0])
            names.append(rest[length.end() : end])
            rest = rest[end:]
        if names and "pyboost" not in names:  # these run single operators
            names[-1] = re.sub(r"^Aclnn(\w+)KernelMod$|^(\w+)AclnnKernelMod$|^(\w+)Ascend$", r"\1\2\3", names[-1])
            found |= {name.replace("_", "").lower() for name in names}
    return found


ALLOWED, NOT_ALLOWED = ("GroupNorm", "Softmax", "Cos", "Mul"), ("RealDiv", "BiasAdd", "ReduceMean", "AssignAdd")


def operator_table(name: str) -> bytes:
    """The C++ object that describes an operator, OpDef; nothing where MindSpore has none."""
    for library in ("libmindspore_ops.so", "libmindspore_core.so"):
        try:
            symbol = f"_ZN9mindspore3ops{len(name) + 1}g{name}E"
            return bytes((ctypes.c_char * 256).in_dll(ctypes.CDLL(str(LIBRARIES / library)), symbol))
        except (OSError, ValueError):
            continue
    return b""


@cache
def place_of_dispatch() -> int | None:
    """The byte of an OpDef that says whether the operator may use aclnn (enable_dispatch_), found by operators of which this
    is known; None if these do not single it out."""
    allowed, not_allowed = ([operator_table(name) for name in names] for names in (ALLOWED, NOT_ALLOWED))
    if not all(allowed + not_allowed):
        return None
    places = [i for i in range(256) if {t[i] for t in allowed} == {1} and {t[i] for t in not_allowed} == {0}]
    return places[0] if len(places) == 1 else None


def dispatches_to_aclnn(name: str) -> bool | None:
    """Whether MindSpore allows aclnn for the operator; None if that cannot be found out."""
    place, described = place_of_dispatch(), operator_table(name)
    if not described:
        return False
    return None if place is None else described[place] == 1
