"""Memory and handles of a long run in one process: `python -m tests.long_runs [NAME ...]`, minutes to an hour.

A line for each: what grew after the warm-up, which is the first fifth.
"""

import gc
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np

import ms_diffusion as md
from ms_diffusion import runtime
from ms_diffusion.samplers import SAMPLERS


def state() -> dict[str, float]:
    """What this process holds: MB of memory, descriptors, threads, children, and compiled graphs."""
    status = Path("/proc/self/status").read_text()
    numbers = {name: int(value) for name, value in re.findall(r"(VmRSS|Threads):\s+(\d+)", status)}
    children = sum(len(p.read_text().split()) for p in Path("/proc/self/task").glob("*/children"))
    graphs = len(runtime.graph_api().ms_compile_cache)
    handles = {"handles": len(os.listdir("/proc/self/fd")), "threads": numbers["Threads"], "children": children}
    return {"MB": numbers["VmRSS"] / 1024, **handles, "graphs": graphs}


def training(folder: Path, preset: str, steps: int, **options: Any) -> list[dict[str, float]]:
    """The states at 20 checkpoints of a run."""
    states = []
    options = {"sample_every": steps // 20, "sample_num": 8, "sample_steps": 4, "device": "cpu"} | options
    md.train(preset, folder / "run", "fashion-mnist-mini", total_steps=steps, save_every=steps // 20, **options,
        on_save=lambda _: states.append(state()))  # fmt: skip
    return states


def quick(folder: Path, steps: int = 2000) -> list[dict[str, float]]:
    """Steps, checkpoints and previews of pixels."""
    return training(folder, "quick", steps)


def latent(folder: Path, steps: int = 500) -> list[dict[str, float]]:
    """Steps, checkpoints and previews of latents."""
    few = {"total_steps": 4, "disc_start": 2, "sample_num": 4, "device": "cpu"}
    md.train("autoencoder", folder / "autoencoder", "fashion-mnist-mini", **few)
    return training(folder, "latent", steps, batch_size=16, log_every=5, first_stage=str(folder / "autoencoder"))


def options_of(i: int) -> dict[str, Any]:
    """Other options for each call of `sample`."""
    samplers = list(SAMPLERS)
    guidance = {"guidance": 1.5 + i % 7 / 2, "guidance_rescale": i % 3 / 4} if i % 2 else {"guidance": 1.0}
    return {"num": (1, 3, 4)[i // 2 % 3], "sampler": samplers[i % len(samplers)], "steps": 2 + i % 5, "seed": i, **guidance}


SMALL = {"dim": 8, "init_dim": 8, "dim_mults": (1,), "resnet_block_groups": 4, "num_timesteps": 100}


def small_run(folder: Path) -> Any:
    """A run with classes that has hardly begun."""
    return md.train(
        "quick-class", folder / "run", "fashion-mnist-mini", total_steps=1, sample_num=1, sample_steps=1, **SMALL
    )


def sample(folder: Path, calls: int = 200) -> list[dict[str, float]]:
    """Calls of `run.sample`, each with other options."""
    run, states = small_run(folder), []
    for i in range(calls):
        run.sample(labels=i % 10, **options_of(i))
        states.append(state())
    return states


def networks(folder: Path, calls: int = 200) -> list[dict[str, float]]:
    """Calls of `md.sample` with a network, as a training loop of one's own makes them."""
    run, states = small_run(folder), []
    for i in range(calls):
        md.sample(run.net, run.diffusion, run.task.shape, 4, cond=[np.full(4, i % 10, np.int32)], steps=2, seed=i)
        states.append(state())
    return states


def load(folder: Path, calls: int = 40) -> list[dict[str, float]]:
    """Runs that are loaded, drawn from and deleted. Each compiles a graph, of which MindSpore 2.10 never frees some 3 MB."""
    small_run(folder)
    states = []
    for _ in range(calls):
        run = md.load(folder / "run", device="cpu")
        run.sample(4, steps=2)
        del run
        gc.collect()
        states.append(state())
    return states


CASES: dict[str, Callable[..., list[dict[str, float]]]] = {
    each.__name__: each for each in (quick, latent, sample, networks, load)
}


def growth(states: list[dict[str, float]], warm_up: float) -> dict[str, float]:
    """How much each number grew from the median of the third of the states that follows the warm-up to that of the last
    third: single garbage collections do not count. "drift" is that of the memory, as a share."""
    states = states[int(warm_up * len(states)) :]
    third = max(len(states) // 3, 1)
    first, last = (
        {name: float(np.median([each[name] for each in part])) for name in states[0]}
        for part in (states[:third], states[-third:])
    )
    return {name: last[name] - first[name] for name in first} | {"drift": last["MB"] / first["MB"] - 1}


def main(names: list[str]) -> int:
    """Measure the cases of these names, or all, each in a process of its own, which starts from nothing."""
    if len(names) != 1:
        calls = [subprocess.run([sys.executable, "-m", "tests.long_runs", name]) for name in names or CASES]
        return max(call.returncode for call in calls)
    clock = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        states = CASES[names[0]](Path(folder))
    grown, seconds = growth(states, 0.2), time.perf_counter() - clock
    print(f"{names[0]}: {states[-1]['MB']:.0f} MB, drift {grown.pop('drift'):.2%} in {seconds:.0f} s;", end=" ")
    print(", ".join(f"{name} {value:+.1f}" for name, value in grown.items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
