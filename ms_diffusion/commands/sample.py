"""Draw samples from a run, or edit images with it: `sample runs/quick --num 64 --out grid.png --gif denoise.gif`."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..runtime import UserError, command, initialise_ranks, one_line
from ..training.pipeline import load
from ..training.runs import BEST, FAST, WEIGHTS, bundled_models, default_run
from ..training.tasks.base import Request
from ..weight_files import read_weights
from . import modelarts
from .parse import parse

LICENSE = "MIT license"  # of every bundled model, as of the package
SCORES: dict[str, Callable[[Any], str]] = {  # what a report beside a bundled model says in a few words
    "evaluation.json": lambda report: (
        f"FID {report['samples']['fid']:.2f} (real images: {report['floor']['fid']:.2f}), "
        f"class accuracy {report['samples']['class_accuracy']:.1%}"
    ),
    "likelihood.json": lambda report: f"{report['bits_per_dim']:.2f} bits per dimension",
}


@dataclass
class Args(Request):
    """Draw samples from a trained run, or edit images with it.

    IMAGE is a file, or test:N, image N of the run's own test set. A run of points gets all its pictures and scores."""

    run: Annotated[str | None, tyro.conf.Positional] = None
    """A run's folder, one of its checkpoints, the name of a bundled model (see --list), or a folder of diffusers with Stable
    Diffusion 1 or 2."""
    size: tuple[int, ...] = ()
    """Height and width of the pictures of Stable Diffusion in pixels, or one number for both; by default those of its
    training."""
    list_: Annotated[bool, tyro.conf.arg(name="list")] = False
    """List the bundled models: size, license and scores."""
    data_url: str | None = None
    """ModelArts: the run's folder, local or obs://."""
    train_url: str | None = None
    """ModelArts: folder for the results, local or obs://."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> int:
    args = parse(Args, argv, prog=command("sample"))
    if args.list_:
        print("\n".join(f"{name:24} {describe(name)}" for name in bundled_models()))
        return 0
    if args.num is not None and args.num < 1:
        raise UserError(f"--num is {args.num}: it must be at least 1")
    if args.data_url and not args.run:
        name, path = None, modelarts.fetch(args.data_url)
    else:
        name = args.run or default_run(args.plain)
        path = Path(name)
    run = load(path, args.sampling.weights, args.sampling.ema_length, args.sampling.device, args.size)
    folder = modelarts.output_folder(args.train_url) or (path if path.is_dir() else path.parent)
    clock = time.perf_counter()
    written = run.task.render(run, args, folder)
    seconds = time.perf_counter() - clock
    if initialise_ranks()[0]:
        return 0  # rank 0 has written
    what = run.task.noun if run.step is None else f"{run.task.noun} of step {run.step}"
    print(one_line(f"{what} in {seconds:.1f} s: {', '.join(map(str, written))}"))
    if not args.run and name == FAST:
        print(f"drawn by {FAST} in few network calls; the bundled model with the best scores: {command('sample')} {BEST}")
    for file in written:
        modelarts.publish(file, args.train_url and f"{args.train_url.rstrip('/')}/{file.name}")
    return 0


def describe(name: str) -> str:
    """A line on a bundled model."""
    file = WEIGHTS / name / "ema.safetensors"
    size, parameters = file.stat().st_size / 1e6, sum(array.size for array in read_weights(file).values())
    said = [f"{parameters:,} parameters, {size:.1f} MB, {LICENSE}"]
    for report in (path for path in map(file.with_name, SCORES) if path.exists()):
        said.append(SCORES[report.name](json.loads(report.read_text())))
    return "; ".join(said)
