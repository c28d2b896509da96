"""The picture of docs/methods.md: the same noise, led to the S-curve by four methods.

python -m benchmarks.methods --out docs/methods.png     # trains four runs in runs/methods, about three minutes on 2 cores
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import ms_diffusion as md
from ms_diffusion.plots2d import save_trajectories
from ms_diffusion.samplers import SeededNoise

FEW = 12  # paths that are shown
FLOW = {"diffusion.shift": None}  # straight: times that are even
EDM = {**FLOW, "diffusion.schedule": "edm", "timestep_sampling": "log-normal", "timestep_mean": -1.2, "timestep_std": 1.2}
TUNED = {**FLOW, "consistency": (1, 2, 3, 4), "total_steps": 5000, "sample_steps": 1, "lr": 5e-4}
# Title: (preset, run, settings, how it is sampled)
METHODS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "DDPM: ddpm, 50 steps": ("scurve", "ddpm", {}, {"sampler": "ddpm", "steps": 50}),
    "its ODE: ddim, 50 steps": ("scurve", "ddpm", {}, {"sampler": "ddim", "steps": 50}),
    "EDM: heun, 18 steps": ("scurve-flow", "edm", EDM, {"sampler": "heun", "steps": 18, "spacing": "karras"}),
    "flow: euler, 10 steps": ("scurve-flow", "flow", FLOW, {"sampler": "euler", "steps": 10, "spacing": "trailing"}),
    "consistency: 1 step": ("scurve-flow", "tuned", TUNED, {"sampler": "consistency", "steps": 1}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="methods.png")
    parser.add_argument("--runs", default="runs/methods", type=Path)
    args, paths = parser.parse_args(), {}
    for title, (preset, name, settings, sampling) in METHODS.items():
        start = {"init_from": str(args.runs / "flow")} if name == "tuned" else {}
        run = md.train(preset, args.runs / name, **settings, **start)
        path = [run.task.decode(SeededNoise(0, range(FEW))((2,)))]

        def watch(i: int, x: Any, x_start: Any, path: list = path, decode: Any = run.task.decode) -> None:
            path.append(decode(x.asnumpy()))

        run.sample(FEW, callback=watch, **sampling)
        paths[title] = np.stack(path)
        samples = run.sample(10_000, **sampling)
        distance = md.compare(samples, run.task.test, np.random.default_rng(0))["sliced_wasserstein"]
        print(f"{title}: {distance['score']:.3f} from held-out data, which are {distance['floor']:.3f} from other data")
    save_trajectories(args.out, paths, run.task.test[:2000], FEW)


if __name__ == "__main__":
    main()
