"""Measure how the cost of the annotated U-Net grows: ``python -m benchmarks.cost cost.png``."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from matplotlib.figure import Figure

from ms_diffusion.commands import benchmark
from ms_diffusion.commands.parse import parse
from ms_diffusion.fields import AT_LEAST_1
from ms_diffusion.runtime import DEVICES, run_program
from ms_diffusion.training.presets import PRESETS

from .speed import start_workers
from .workers import alternate

START = {"batch_size": 16, "size": 32, "dim": 32}
SWEEPS = {"batch_size": (1, 4, 16, 64, 256), "size": (16, 32, 48, 64), "dim": (16, 32, 48, 64)}  # one at a time, from START


@dataclass
class Args:
    """Time training step and forward pass over batch size, image size and width; print a table and draw a picture."""

    out: Annotated[str, tyro.conf.Positional] = "cost.png"
    """Picture (PNG)."""
    rounds: Annotated[int, AT_LEAST_1] = 5
    """Rounds of each measurement; the median counts."""
    json: str | None = None
    """Also write all figures to this file."""
    device: Literal[DEVICES] = "auto"
    """Device: auto is Ascend if present, otherwise GPU, otherwise CPU."""
    debug: bool = False
    """Show the traceback of an error."""


def measure(args: Args) -> list[dict[str, Any]]:
    """Seconds of a training step and of a forward pass and the peak memory (MiB), as a table, drawn in `args.out`."""
    records = []
    print("varied     value   step ms   forward ms   memory MiB")
    for varied, values in SWEEPS.items():
        for value in values:
            setting = START | {varied: value}
            preset = PRESETS["fashion-mnist"]
            data, model = replace(preset.data, size=setting["size"]), replace(preset.model, dim=setting["dim"])
            config = replace(preset, data=data, model=model)
            with start_workers(config, setting["batch_size"], args.device) as workers:
                step, forward = (np.median(alternate(workers, args.rounds, m)["mindspore"]) for m in ("step", "forward"))
                memory = workers["mindspore"].memory
            records.append({"varied": varied, **setting, "step": float(step), "forward": float(forward), "memory": memory})
            print(f"{varied:10} {value:5} {step * 1e3:9.1f} {forward * 1e3:12.1f} {memory:12.0f}", flush=True)
    draw(records, Path(args.out))
    return records


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """One panel for each sweep: milliseconds over the varied value, on logarithmic axes."""
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    for axes, varied in zip(figure.subplots(1, 3, sharey=True), SWEEPS, strict=True):
        rows = [r for r in records if r["varied"] == varied]
        for name in ("step", "forward"):
            axes.loglog([r[varied] for r in rows], [r[name] * 1e3 for r in rows], "o-", label=name)
        axes.set_xticks([r[varied] for r in rows], [str(r[varied]) for r in rows])
        axes.minorticks_off()
        axes.set_xlabel(varied.replace("_", " "))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("ms")
    figure.axes[0].legend()
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str]) -> int:
    args = parse(Args, argv)
    Path(args.out).absolute().parent.mkdir(parents=True, exist_ok=True)
    return benchmark.run(args, measure)


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
