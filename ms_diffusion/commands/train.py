"""Train a run: `train --preset quick`. The same command again continues a run that was stopped."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, get_type_hints

import tyro

from .. import runtime
from ..fields import OneOf
from ..runtime import DEVICES, UserError, command
from ..training.checkpoint import best_checkpoint, read_state
from ..training.compvis import from_compvis
from ..training.config import RENAMED, Config, check_one_length
from ..training.loop import train_task
from ..training.presets import PRESETS
from ..training.tasks.base import Task
from . import modelarts
from .parse import parse, rename_flags

C = TypeVar("C", bound=Config)


@dataclass
class Args(Generic[C]):
    """Train a diffusion model. The same command again continues a run that was stopped."""

    config: Annotated[C, tyro.conf.arg(name="")]
    preset: Annotated[str, OneOf(PRESETS)] = "quick"
    """Named configuration that the other flags change."""
    yaml: Annotated[str | None, tyro.conf.arg(name="config")] = None
    """Configuration file of CompVis latent-diffusion (.yaml), in place of --preset."""
    run_dir: str | None = None
    """Folder of the run; by default runs/PRESET, or runs/ and the name of the file of --config."""
    device: Literal[DEVICES] = "auto"
    """Device: auto is Ascend, then GPU, then CPU."""
    data_url: str | None = None
    """ModelArts: the data, local or obs://: a folder, an archive (.zip, .tar, .tar.gz) or arrays (.npz)."""
    train_url: str | None = None
    """ModelArts: folder that receives the run, local or obs://. A run that is there is continued."""
    ckpt_url: str | None = None
    """ModelArts: folder of a run to continue, local or obs://, where --train-url has none that is further."""
    upload_minutes: float = 10.0
    """Minutes between two uploads to --train-url. There is one after each checkpoint, too."""
    debug: bool = False
    """Show the traceback of an error."""


def parse_args(argv: Sequence[str]) -> Args:
    """The command line over the preset, or the configuration file, that it names."""
    argv = rename_flags(argv, RENAMED)
    check_one_length(argument for argument in argv if argument.startswith("--train."))
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", nargs="?", const="")
    first.add_argument("--config", nargs="?", const="")
    first.add_argument("--init-from", "--init_from")
    known = first.parse_known_args(argv)[0]
    if known.config is not None:
        if known.preset is not None:
            raise UserError(f"--config {known.config} is in place of a preset: leave out --preset {known.preset}")
        preset, name = from_compvis(known.config, bool(known.init_from)), "quick"
    else:
        name = "quick" if known.preset is None else known.preset
        if name not in PRESETS:
            raise UserError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
        preset = PRESETS[name]
    return parse(Args[type(preset)], argv, Args(preset, name, known.config), command("train"))  # type: ignore[misc]


def main(argv: Sequence[str]) -> int:
    args = parse_args(argv)
    if not args.upload_minutes > 0:
        raise UserError(f"--upload-minutes is {args.upload_minutes:g}: it must be above 0")
    if args.run_dir is not None and not args.run_dir.strip():
        raise UserError("--run-dir is empty: give the folder of the run, or leave it out")
    run_dir = Path(
        args.run_dir
        or modelarts.output_folder(args.train_url)
        or f"runs/{Path(args.yaml).stem if args.yaml else args.preset}"
    )
    config, arrays = modelarts.use_data(args.config, args.data_url) if args.data_url else (args.config, None)
    if args.train_url:
        modelarts.check_writable(args.train_url)
    for url in (args.ckpt_url, args.train_url):
        modelarts.restore(run_dir, url, config)
    device, task = runtime.set_device(args.device), config.task(arrays)
    uploads = modelarts.Uploads(run_dir, args.train_url, args.upload_minutes)
    try:
        step, preview = train_task(task, run_dir, device, runtime.STOP, uploads.ask)
        total = task.config.train.total_steps
        code = 130 if preview is None else 0
        if task.rank == 0:
            uploads.ask(run_dir)
    finally:
        arrived = uploads.finish()
    if task.rank == 0:
        if code:
            print(f"stopped at step {step} of {total}, all saved. To continue: {command('train')} {shlex.join(argv)}")
        else:
            report(task, run_dir, preview)
    return code or (0 if arrived else 2)


def from_preset(config: Config) -> tuple[str, dict[str, Any]] | None:
    """The preset that a configuration is nearest to, and its values that differ from it, by the dotted names of their
    fields. None if no preset has such a network."""
    ours, found = values_of(config), {}
    for name, preset in PRESETS.items():
        if (type(preset), type(preset.model)) == (type(config), type(config.model)):
            theirs = values_of(preset)
            found[name] = {field: value for field, value in ours.items() if value != theirs[field]}
    return min(found.items(), key=lambda item: len(item[1]), default=None)


def values_of(config: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a configuration that flags set, by the dotted names of their fields."""
    values, hints = {}, get_type_hints(type(config), include_extras=True)
    for each in fields(config):
        value, marks = getattr(config, each.name), getattr(hints[each.name], "__metadata__", ())
        if is_dataclass(value) and tyro.conf.Suppress not in marks:
            values |= values_of(value, f"{prefix}{each.name}.")
        elif tyro.conf.Suppress not in marks:
            values[prefix + each.name] = value
    return values


def flags_of(values: dict[str, Any]) -> list[str]:
    """The command line that sets the fields of these dotted names."""
    flags = []
    for name, value in values.items():
        section, dot, last = name.replace("_", "-").rpartition(".")
        if isinstance(value, bool):
            flags.append(f"--{section}{dot}{'' if value else 'no-'}{last}")
        else:
            flags += [f"--{section}{dot}{last}", *map(str, value if isinstance(value, tuple) else [value])]
    return flags


def command_of(config: Config, run_dir: str | Path) -> str | None:
    """The command that trains a run of this configuration, or goes on with it. None if no command does: its data were given
    from Python, or no preset has its network."""
    found = from_preset(config)
    if not found or config.data.name == "arrays":
        return None
    preset, values = found
    if config.train.epochs is not None:
        values.pop("train.total_steps", None)  # which is computed from them
    flags = ["--preset", preset, "--run-dir", str(run_dir), *flags_of(values)]
    return f"{command('train')} {shlex.join(flags)}"


def report(task: Task, run_dir: Path, preview: Path | None) -> None:
    """Say what is in the folder of a run that has ended, and what can be done with it."""
    total = task.config.train.total_steps
    if task.start_step >= total > 0:
        print(f"{run_dir} is finished: raise --train.total-steps to train on, or choose another --run-dir for a new run")
    if best := best_checkpoint(run_dir):
        state = read_state(best)
        fid = state.get("fid")
        print(f"best loss   {state['val_loss_ema']:.4f}, in {best}" if fid is None else f"best FID    {fid:.2f}, in {best}")
    if preview:
        print(f"samples     {preview}")
    if total:
        print(f"loss curve  {run_dir / 'loss.png'}\nmetrics     {run_dir / 'metrics.jsonl'}")
    for purpose, line in task.next_commands().items():
        name, _, arguments = line.partition(" ")
        print(f"{purpose + ':':12} {command(name)} {arguments}")
