"""Run presets on a card that is not there and print, as JSON, what the card would have been told a step:

    python -m tests.dry_run.run ascend --preset quick --mode train sample --precision fp32 fp16 --soc Ascend910B2

Every combination of presets, modes and precisions is measured in this one process, whose results are garbage."""

import argparse
import ctypes
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .build import DEVICES, MAIN, libraries

PRECISIONS = ("fp32", "fp16", "bf16")
SOCS = ("Ascend910B2", "Ascend910_9391", "Ascend310P3")
FLAWS = {"host": "on the host", "dynamic": "of a dynamic shape", "float64": "in float64", "half": "in 16 bits"}
FLAWS["constant"] = "assigns to a constant, which nobody reads"
WARM = 2  # calls before the first count
LOOP = 10  # steps in one call, for presets with a loop in the graph
SAMPLES = 64
# Norms, softmax, time embedding, losses, Adam and averages, which are float32 in all precisions
FLOAT32 = re.compile(r"GroupNorm|LayerNorm|BatchNorm|LogSoftmax|Softmax|Sin|Cos|SmoothL1Loss|ReduceMean|Mean|Adam|Lerp")
NOT_LAUNCHED = re.compile(r"Create|Destroy|Set|Get|Find|Status|Version|bufferSize|GetErrorString")


class Card:
    """The stand-in of a device in this process; made before MindSpore is imported."""

    def __init__(self, device: str, soc: str = SOCS[0]):
        self.device, folder = device, libraries(device)
        self.scratch = Path(tempfile.mkdtemp(prefix="dry-run-"))
        self.ir = self.scratch / "ir"
        os.environ |= {
            "MS_DEV_SAVE_GRAPHS": "1",
            "MS_DEV_SAVE_GRAPHS_PATH": str(self.ir),
            "MS_DEV_DUMP_IR_PASSES": "graph_build",  # of the front end's passes none
        }
        if device == "ascend":
            home = folder / "cann"
            os.environ |= {"ASCEND_HOME_PATH": str(home), "ASCEND_OPP_PATH": str(home / "opp"), "DRY_RUN_SOC": soc}
            sys.path.insert(0, str(folder / "python"))
        else:
            os.environ["CUDA_HOME"] = str(folder / "cuda")
        main = next(folder.rglob(MAIN[device]))
        # Loaded first, so that MindSpore's plugin finds these by their names, and no others that may be installed
        self.library, *_ = (ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL) for path in [main, *main.parent.iterdir()])
        self.library.dry_run_counts.restype = ctypes.c_char_p

    def counts(self) -> Counter[str]:
        """How often each function was called so far; also "copy H2D", "aclop AddN" and the like."""
        rows = (line.split("\t") for line in self.library.dry_run_counts().decode().splitlines())
        return Counter({name: int(times) for name, times in rows})

    def answer(self, truths: int) -> None:
        """Of the conditions that the host reads of the card from now on, let this many be true, one false, and so on."""
        self.library.dry_run_answer(truths)

    def graphs(self) -> Iterator[str]:
        """The text of each graph that was compiled since the last call: nodes with their types and devices."""
        for path in sorted([*self.ir.glob("graph_build_*.ir"), *self.ir.glob("actor_set/final_*.ir")]):
            yield path.read_text()
        for path in self.ir.rglob("*"):
            if path.is_file():
                path.unlink()

    def launch(self, name: str) -> str | None:
        """What a function launches on the card, or None if it launches nothing."""
        if self.device == "ascend":
            launched = name.startswith(("aclnn", "aclop ")) and not name.endswith("GetWorkspaceSize")
            launched |= name.startswith(("aclrtLaunch", "HcclAll", "HcclReduce", "HcclBroadcast"))
            return name if launched else None
        if name.startswith("_Z"):  # one of MindSpore's own kernels
            length = re.match(r"_Z(\d+)", name)
            return name[length.end() :][: int(length[1])] if length and "CUstream_st" in name else None
        library = re.match(r"cublas|cudnn|cufftExec|curandGenerate|cusolverDn|cusparse|cu(da)?Launch", name)
        return name if library and not NOT_LAUNCHED.search(name) else None


def flaws(graph: str) -> dict[str, list[str]]:
    """What a card's graph should not have, with the nodes that have it."""
    found: dict[str, set[str]] = {name: set() for name in FLAWS}
    node = ""
    for line in graph.splitlines():
        if made := re.match(r"\s*%\S+ = (?:\S+:)?(\w+)", line):
            node = made[1].removeprefix("PrimFunc_")
            if re.search(r"= (\S+:)?(PrimFunc_)?(Assign\w*|\w*Adam\w*)\(Tensor\(", line):
                found["constant"].add(node)
        if 'primitive_target: "CPU"' in line or re.search(r"device context: CPU_\d+ *$", line) or node == "PyExecute":
            found["host"].add(node)
        if re.match(r"\s*(:|# (shape|type) :)", line):
            if re.search(r"[<(](\d+, )*-[12][,)]", line):
                found["dynamic"].add(node)
            if re.search(r"Tensor\[B?Float16\]", line) and FLOAT32.match(node):
                found["half"].add(node)
            if "Tensor[Float64]" in line:  # a scalar is an attribute
                found["float64"].add(node)
    return {name: sorted(node for node in nodes if not node.endswith("Actor")) for name, nodes in found.items()}


After = Callable[[int], None]  # is called after call i


def measure(card: Card, work: Callable[[int, After], None], counted: int, steps: int = 1) -> dict[str, Any]:
    """Count what work(calls, after) tells the card in `counted` calls, of `steps` steps each, after the first `WARM`."""
    import mindspore as ms
    from mindspore.common.api import ms_compile_cache

    def settled() -> Counter[str]:
        ms.runtime.synchronize()
        return card.counts()

    first, marks = [], []

    def after(i: int) -> None:
        if i == 0:
            ms.runtime.synchronize()
            first.append((len(ms_compile_cache), time.perf_counter()))
        if i in (WARM - 1, WARM + counted - 1):
            start = time.perf_counter()
            marks.append((settled(), start, time.perf_counter()))

    record: dict[str, Any] = {"error": None}
    start = time.perf_counter()
    try:
        card.answer(steps if steps > 1 else 10**9)  # a loop of so many steps, or a step that has not overflowed
        work(WARM + counted, after)
        ms.runtime.synchronize()
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as e:
        record["error"] = f"{type(e).__name__}: {e}"[:600]
    found = [flaws(graph) for graph in card.graphs()]
    record |= {name: sorted({node for each in found for node in each[name]}) for name in FLAWS}
    if record["error"]:
        return record
    idle = settled()
    idle = settled() - idle  # what waiting costs
    (before, _, begun), (then, ended, _) = marks
    calls = {name: (then[name] - before[name] - idle[name]) / (counted * steps) for name in then}
    calls = {name: round(times, 2) if times % 1 else int(times) for name, times in calls.items()}
    launches: Counter[str] = Counter()
    for name, times in calls.items():
        if times > 0 and (launched := card.launch(name)):
            launches[launched] += times
    waits = {name: times for name, times in calls.items() if "Synchronize" in name and times > 0}
    record |= {
        "launches": round(sum(launches.values()), 2),
        "aclnn": round(sum(times for name, times in launches.items() if name.startswith("aclnn")), 2),
        "aclop": round(sum(times for name, times in launches.items() if name.startswith("aclop")), 2),
        **{kind: calls.get(f"copy {kind}", 0) for kind in ("H2D", "D2H", "D2D")},
        "synchronisations": round(sum(waits.values()), 2),
        "conditions": calls.get("condition", 0),
        "recompilations": len(ms_compile_cache) - first[0][0],
        "host_ms": round((ended - begun) * 1000 / (counted * steps), 2),
        "first_s": round(first[0][1] - start, 1),
        "types": dict(launches.most_common()),
        "waits": waits,
    }
    if card.device == "gpu":
        del record["aclnn"], record["aclop"]
    return record


# Tasks and controls


@cache
def first_stage(folder: Path) -> str:
    """An autoencoder's run with initial weights, for the presets of latents."""
    from ms_diffusion.training.presets import PRESETS
    from tests.runs import untrained

    return str(untrained(folder / "first-stage", PRESETS["autoencoder"]))


def start_task(card: Card, preset: str, precision: str) -> Any:
    """A preset's task with few random data, started in an empty folder. Raises UserError if the kind lacks the precision."""
    from ms_diffusion.data.batches import random_images
    from ms_diffusion.models.lpips import LPIPS
    from ms_diffusion.training.presets import PRESETS
    from ms_diffusion.training.tasks import autoencoder, latents

    config: Any = PRESETS[preset]
    train, folder = replace(config.train, total_steps=10**6), Path(tempfile.mkdtemp(dir=card.scratch))
    data = None
    if config.kind == "autoencoder":
        train = replace(train, disc_start=0)
        if config.model.channels != 1:  # LPIPS has random weights where there is no file of them
            autoencoder.load_lpips = lambda *_: LPIPS()
            train = replace(train, vgg="random", lpips="random")
    if config.kind == "points":
        train = replace(train, steps_per_call=min(train.steps_per_call, LOOP))
    else:
        data = random_images(max(train.batch_size, SAMPLES), config.data.size, config.model.channels)
        config = replace(config, data=replace(config.data, dir=str(folder)))
    if config.kind == "latents":
        config = replace(config, first_stage=first_stage(card.scratch), latent_scale=1.0)
        latents.check_values = lambda *_: None  # nothing is computed, so the latents are what was in memory
    task = replace(config, train=train, precision=precision).task(data)
    task.config.check()
    task.start(folder / "run", {"ascend": "Ascend", "gpu": "GPU"}[card.device])
    return task


def training(task: Any, calls: int, after: After) -> None:
    batches = task.batches()
    for i in range(calls):
        task.advance(next(batches), i)
        after(i)


def sampling(task: Any, calls: int, after: After) -> None:
    """DDIM with the preset's guidance in every step; of an autoencoder, images through encoder and decoder."""
    from ms_diffusion.sampling import Sampling

    if not hasattr(task, "diffusion"):
        for i in range(calls):
            task.average.reconstruct(task.data[:2])
            after(i)
        return
    options = replace(Sampling(steps=calls, batch_size=SAMPLES).resolve(task), guidance_interval=None)
    cond = task.in_order(task.preview_conditions(SAMPLES))
    task.decode(task.average.draw(options, SAMPLES, cond, lambda i, *_: after(i)))


def gradients(task: Any, calls: int, after: After) -> None:
    """The gradients of a training step without the rest, which is the update."""
    import mindspore as ms
    from mindspore import ops

    from ms_diffusion.training.step import in_one_copy

    (pack,), loss_fn = task.packs, task.make_loss()
    loss_and_gradients = ms.value_and_grad(loss_fn, None, pack.trained)

    def step(*batch):
        loss, found = loss_and_gradients(*batch)
        return ops.depend(loss, pack.join(found))

    graph, batches = in_one_copy(step), task.batches()
    for i in range(calls):
        graph(*next(batches).values())
        after(i)


MODES = {"train": training, "sample": sampling, "gradients": gradients}


def controls() -> dict[str, Callable[[int], Any]]:
    """Graphs that a card should not get; each call takes its number."""
    import numpy as np

    import mindspore as ms
    from mindspore import Tensor, ops

    x = Tensor(np.ones((2, 2), np.float32))
    same = {"out_shape": lambda x: x, "out_dtype": lambda x: x, "func_type": "pyfunc"}
    on_host = ops.Custom(lambda x: x, **same)

    def good(x):
        return ops.cos(x) + 1

    def einsum(x):
        return ops.einsum("ij,jk->ik", x, x)

    def pyfunc(x):
        return on_host(x * 2) + 1

    def float64(x):
        return ops.cos(x.astype(ms.float64))

    def dynamic(x):
        return ops.nonzero(x) * 2

    def scaled(x, factor):
        return x * factor

    def copying(x):
        return ops.cos(x)

    holder = SimpleNamespace(parameter=ms.Parameter(x, name="held"))

    def constant(x):
        return ops.assign(holder.parameter, ops.cos(x))

    graphs = {fn.__name__: ms.jit(fn) for fn in (good, einsum, pyfunc, float64, dynamic, constant, scaled, copying)}
    calls: dict[str, Callable[[int], Any]] = {
        name: lambda i, graph=graphs[name]: graph(x)
        for name in ("good", "einsum", "pyfunc", "float64", "dynamic", "constant")
    }
    calls["recompiled"] = lambda i: graphs["scaled"](x, float(i))
    calls["copying"] = lambda i: graphs["copying"](Tensor(np.ones((2, 2), np.float32))).asnumpy()
    return calls


def run(card: Card, counted: int, preset: str, mode: str, precision: str) -> dict[str, Any]:
    """The record of a preset, or of a control, of which there are no modes and precisions."""
    from ms_diffusion.runtime import UserError

    if preset.startswith("control-"):
        call = controls()[preset.removeprefix("control-")]

        def work(calls: int, after: After) -> None:
            for i in range(calls):
                call(i)
                after(i)

        return {"preset": preset, **measure(card, work, counted)}
    record: dict[str, Any] = {"preset": preset, "mode": mode, "precision": precision}
    try:
        task = start_task(card, preset, precision)
    except UserError as e:
        return record | {"refused": str(e)}  # there may be no such precision for this kind
    steps = task.steps_per_call if mode == "train" else 1
    return record | measure(card, partial(MODES[mode], task), counted, steps)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.dry_run.run", description=__doc__)
    parser.add_argument("device", choices=DEVICES)
    parser.add_argument("--preset", nargs="+", default=["quick"])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["train"])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32"])
    parser.add_argument("--soc", default=SOCS[0], help="such as " + ", ".join(SOCS))
    parser.add_argument("--steps", type=int, default=10, help="calls to count, after the first 2")
    parser.add_argument("--cases", help="a JSON list of [preset, mode, precision], in place of all combinations")
    args = parser.parse_args()
    cases = [(p, m, q) for p in args.preset for m in args.mode for q in args.precision]
    cases = json.loads(args.cases) if args.cases else cases

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    card = Card(args.device, args.soc)
    from ms_diffusion import runtime

    runtime.set_device(args.device)
    records = [run(card, args.steps, *case) for case in cases]
    json.dump({"card": args.soc if args.device == "ascend" else "gpu", "records": records}, out, indent=1)
    out.write("\n")
    out.close()
    shutil.rmtree(card.scratch)
    sys.stdout.flush()
    os._exit(0)  # the stand-in has nothing to tidy up, and MindSpore would wait for it


if __name__ == "__main__":
    main()
