"""Train a run: `train --preset quick`. The same command again continues a run that was stopped."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

import tyro

from .. import runtime
from ..fields import OneOf
from ..runtime import DEVICES, UserError, command
from ..training.checkpoint import best_checkpoint, read_state
from ..training.config import RENAMED, Config
from ..training.loop import train_task
from ..training.presets import PRESETS
from . import modelarts
from .parse import parse, rename_flags

C = TypeVar("C", bound=Config)


@dataclass
class Args(Generic[C]):
    """Train a diffusion model. The same command again continues a run that was stopped."""

    config: Annotated[C, tyro.conf.arg(name="")]
    preset: Annotated[str, OneOf(PRESETS)] = "quick"
    """Named configuration that the other flags change."""
    run_dir: str | None = None
    """Folder of the run; by default runs/PRESET."""
    device: Literal[DEVICES] = "auto"
    """Device: auto is Ascend, then GPU, then CPU."""
    data_url: str | None = None
    """ModelArts: folder of the data, local or obs://."""
    train_url: str | None = None
    """ModelArts: folder that receives the run, local or obs://."""
    debug: bool = False
    """Show the traceback of an error."""


def parse_args(argv: Sequence[str]) -> Args:
    """The command line over the preset that it names."""
    argv = rename_flags(argv, RENAMED)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="quick", nargs="?")
    name = first.parse_known_args(argv)[0].preset
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    args = parse(Args[type(preset)], argv, Args(preset, name), command("train"))  # type: ignore[misc]
    if args.data_url:
        args.config = replace(args.config, data=replace(args.config.data, dir=str(modelarts.fetch(args.data_url))))
    return args


def main(argv: Sequence[str]) -> int:
    args = parse_args(argv)
    total = args.config.train.total_steps
    run_dir = Path(args.run_dir or modelarts.output_folder(args.train_url) or f"runs/{args.preset}")
    device = runtime.set_device(args.device)
    task = args.config.task()
    step, preview = train_task(task, run_dir, device, runtime.STOP, lambda folder: modelarts.publish(folder, args.train_url))
    if runtime.STOP.is_set():
        if task.rank == 0:
            print(f"stopped at step {step} of {total}, all saved. To continue: {command('train')} {shlex.join(argv)}")
        return 130
    if task.rank:
        return 0
    if task.start_step >= total > 0:
        print(f"{run_dir} is finished: raise --train.total-steps to train on, or choose another --run-dir for a new run")
    modelarts.publish(run_dir, args.train_url)
    if best := best_checkpoint(run_dir):
        print(f"best FID    {read_state(best)['fid']:.2f}, in {best}")
    print(f"samples     {preview}")
    if total:
        print(f"loss curve  {run_dir / 'loss.png'}\nmetrics     {run_dir / 'metrics.jsonl'}")
    for purpose, line in task.next_commands().items():
        name, _, arguments = line.partition(" ")
        print(f"{purpose + ':':12} {command(name)} {arguments}")
    return 0
