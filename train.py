"""Train a diffusion model: python train.py --preset quick. The same command again goes on where a run stopped."""

from ms_diffusion import runtime

STOP = runtime.catch_interrupts() if __name__ == "__main__" else None  # must precede the import of MindSpore

# ruff: noqa: E402
import argparse
import json
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tqdm import tqdm

from mindspore import Tensor

from ms_diffusion import images
from ms_diffusion.commands import modelarts
from ms_diffusion.commands import parse as cli
from ms_diffusion.data.batches import make_dataset
from ms_diffusion.runtime import DEVICES, UserError
from ms_diffusion.training.checkpoint import best_checkpoint, read_state
from ms_diffusion.training.presets import PRESETS, Config
from ms_diffusion.training.tasks.everything import autoencoder_task, diffusion_task


@dataclass
class Args:
    """Train a diffusion model. The same command again goes on where a run stopped."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    preset: Literal[tuple(PRESETS)] = "quick"
    """The named run that the other flags change."""
    run_dir: str | None = None
    """Folder of the run; runs/PRESET if not given."""
    device: Literal[DEVICES] = "auto"
    """Where to run; auto is Ascend, then GPU, then CPU."""
    data_url: str | None = None
    """ModelArts: folder of the data, local or obs://."""
    train_url: str | None = None
    """ModelArts: folder that receives the run, local or obs://."""
    debug: bool = False
    """Show the traceback of an error."""


def parse_args(argv=None) -> Args:
    """The command line over the preset that it names; in ModelArts, data_url and train_url become folders."""
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="quick", nargs="?")
    name = first.parse_known_args(argv)[0].preset
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    args = cli.parse(Args, Args(PRESETS[name], name), argv)
    if args.data_url:
        args.config = replace(args.config, data=replace(args.config.data, dir=str(modelarts.fetch(args.data_url))))
    args.run_dir = Path(args.run_dir or modelarts.output_folder(args.train_url) or f"runs/{args.preset}")
    return args


def check_run(run_dir: Path, config: Config) -> None:
    """Refuse a folder that holds another run: of its parts only the place of the data and the training may change."""

    def fixed(c: Config) -> dict:
        data = replace(c.data, dir=None)
        parts = {"model": c.model, "diffusion": c.diffusion, "data": data, "precision": c.precision, "seed": c.train.seed}
        return parts | {"--first-stage-patch": c.first_stage_patch, "--latent-scale": c.latent_scale}

    record = run_dir / "config.json"
    if record.exists():
        old, new = fixed(Config.from_json(record)), fixed(config)
        for name in old:
            if old[name] != new[name]:
                raise UserError(
                    f"{run_dir} holds a run with another {name}: use another --run-dir, or the same command as then"
                )


class Metrics:
    """metrics.jsonl: a line of numbers every `log_every` steps; lines after the resumed step are dropped."""

    def __init__(self, path: Path, start: int):
        self.path, self.rows = path, []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # a crash cut the last line
                    break
                if row["step"] <= start:
                    self.rows.append(row)
        images.write(path, lambda f: f.write("".join(json.dumps(row) + "\n" for row in self.rows).encode()))

    def append(self, **row) -> None:
        self.rows.append(row)
        with open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")

    def draw(self, path: Path) -> None:
        steps, losses = ([row[key] for row in self.rows if "loss" in row] for key in ("step", "loss"))
        scores = [(row["step"], row["fid"]) for row in self.rows if "fid" in row]
        if steps:
            images.save_loss_curve(path, steps, losses, scores)


def main() -> int:
    args = parse_args()
    config, run_dir, train = args.config, args.run_dir, args.config.train
    device = runtime.set_device(args.device)
    rank, world_size = runtime.initialise_ranks()

    # What is trained, and the step to go on from
    check_run(run_dir, config)
    make_task = autoencoder_task if config.is_autoencoder else diffusion_task
    task = make_task(config, run_dir, device, rank, world_size)
    checkpoint, per_call = task.checkpoint, task.per_call
    start = task.state["step"] if task.state else 0
    if start:
        print(f"resuming at step {start} of {train.total_steps} in {run_dir}")
    batches = ()
    if start < train.total_steps:
        batches = make_dataset(
            task.data,
            task.labels,
            train.batch_size,
            train.total_steps,
            start,
            train.seed,
            config.data.flip,
            rank,
            world_size,
            per_call,
        ).create_tuple_iterator(num_epochs=1, output_numpy=True)
    images.write(run_dir / "config.json", lambda f: f.write(config.to_json().encode()))
    steps_per_epoch = max(len(task.data) // (train.batch_size * world_size), 1)
    metrics = Metrics(run_dir / "metrics.jsonl", start) if rank == 0 else None

    def save(step: int, fid: float | None = None) -> None:
        if rank == 0:
            record = json.loads(config.to_json())
            epoch = step // steps_per_epoch
            checkpoint.save(step, epoch=epoch, seed=train.seed, fid=fid, config=record, **task.record)
            metrics.draw(run_dir / "loss.png")
            modelarts.publish(run_dir, args.train_url)

    if config.init_from and not task.state:
        save(0)

    # Train
    step, losses, last_grid, clock = start, [], None, time.perf_counter()
    rates = task.optimizer.learning_rate(Tensor(np.arange(train.total_steps, dtype=np.int32))).asnumpy()
    bar = tqdm(total=train.total_steps, initial=start, unit="step", disable=rank > 0, dynamic_ncols=True)
    bar.set_postfix_str("compiling" if batches else "finished")
    for x_start, label in batches:
        loss, norm, parts = task.advance(x_start, label, step)
        losses.append(loss)
        step += per_call
        bar.update(per_call)
        if step % train.log_every == 0 or step == train.total_steps or STOP.is_set():
            mean = float(np.mean([value.asnumpy() for value in losses]))
            rate = len(losses) * per_call * train.batch_size * world_size / (time.perf_counter() - clock)
            if not np.isfinite(mean):
                raise UserError(
                    f"the loss is {mean} at step {step}: resume with a lower --train.lr from the last checkpoint"
                )
            bar.set_postfix_str(f"loss {mean:.4f}, {rate:.0f} {'points' if config.is_points else 'img'}/s")
            if rank == 0:
                metrics.append(
                    step=step,
                    loss=mean,
                    grad_norm=float(norm.asnumpy()),
                    lr=float(rates[step - 1]),
                    img_per_s=rate,
                    epoch=step / steps_per_epoch,
                    **{name: float(value.asnumpy()) for name, value in parts.items()},
                )
            losses, clock = [], time.perf_counter()
        if STOP.is_set():
            break
        if rank == 0 and (step % train.sample_every == 0 or step == train.total_steps):
            bar.set_postfix_str("sampling")
            last_grid = task.draw_samples(step)
            clock = time.perf_counter()
        fid, is_best = None, False
        if task.score and (step % train.score_every == 0 or step == train.total_steps):
            bar.set_postfix_str("scoring")
            fid, best = task.score(step), best_checkpoint(run_dir)
            metrics.append(step=step, fid=fid)
            is_best = best is None or fid < read_state(best)["fid"]
            clock = time.perf_counter()
        if step % train.save_every == 0 or step == train.total_steps or is_best:
            save(step, fid)
            clock = time.perf_counter()
    bar.close()

    if STOP.is_set():
        if step > start:
            save(step)
        if rank == 0:
            command = shlex.join(["python", *sys.argv])
            print(f"stopped at step {step} of {train.total_steps}, all saved. To go on: {command}")
        return 130
    if rank == 0:
        if start >= train.total_steps > 0:
            print(f"{run_dir} is finished: raise --train.total-steps to train on, or choose another --run-dir for a new run")
        last_grid = last_grid or task.draw_samples(step)
        modelarts.publish(run_dir, args.train_url)
        best = best_checkpoint(run_dir)
        if best:
            print(f"best FID    {read_state(best)['fid']:.2f}, in {best}")
        print(f"samples     {last_grid}")
        if step:
            print(f"loss curve  {run_dir / 'loss.png'}\nmetrics     {run_dir / 'metrics.jsonl'}")
        if config.is_autoencoder:
            print(f"scores      python -m ms_diffusion.evaluate {run_dir}")
            print(f"diffusion   python train.py --preset latent --first-stage {run_dir}")
        else:
            print(f"{'pictures, scores' if config.is_points else 'more images'}: python sample.py {run_dir}")
    return 0


if __name__ == "__main__":
    runtime.run_program(main)
