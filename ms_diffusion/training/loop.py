"""The training loop of every kind of run: steps, log, previews, scores, checkpoints; and its Python function, `train()`."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mindspore import Tensor

from ..fields import check_fields
from ..files import write
from ..images import save_loss_curve
from ..runtime import UserError, barrier, gather, initialise_ranks, ranks, set_device
from .checkpoint import best_checkpoint, read_state
from .config import Config, override
from .presets import PRESETS
from .runs import Run
from .tasks.base import Task

OnSave = Callable[[Path], None] | None


def train(config: str | Config = "quick", run_dir: str | Path | None = None, data: Any = None, *, device: str = "auto",
        stop: threading.Event | None = None, on_save: OnSave = None, **overrides: Any) -> Run:  # fmt: skip
    """Train a run, or continue one: the same call goes on where it stopped. Returns the run, ready to sample from. Raises
    UserError if the configuration or the data are not valid, the folder holds another run, or training diverged.

    Args:
        config: The name of a preset, or a configuration.
        run_dir: Folder of the run; by default runs/PRESET.
        data: Training data in place of the preset's: an array (N, H, W, C) uint8, (images, labels), a folder, or the name
            of a data set. Points: an array (N, 2), a file, or a name.
        device: auto (Ascend, then GPU, then CPU), ascend, gpu or cpu.
        stop: Training saves a checkpoint and returns soon after this event is set.
        on_save: Called with the run's folder after each checkpoint.
        overrides: Values of the configuration's fields, such as total_steps=1000 or lr=1e-3."""
    if isinstance(config, str):
        if config not in PRESETS:
            raise UserError(f"unknown preset {config!r}: choose one of {', '.join(PRESETS)}")
        run_dir, config = run_dir or f"runs/{config}", PRESETS[config]
    if run_dir is None:
        raise UserError("run_dir is missing: give the folder of the run")
    chosen, arrays = override(config, **overrides), None
    check_fields(chosen)  # the types of values from Python; whether they fit the data is checked with the data
    if data is not None:
        chosen, arrays = chosen.with_data(data)
    name = set_device(device)
    train_task(chosen.task(arrays), Path(run_dir), name, stop or threading.Event(), on_save)
    barrier()  # rank 0 has written everything
    run = Run(run_dir)
    run.task.given_data = arrays
    return run


def train_task(task: Task, run_dir: Path, device: str, stop: threading.Event,
        on_save: OnSave = None) -> tuple[int, Path | None]:  # fmt: skip
    """Train the task to its last step, or until `stop` is set on any rank, which then is set on all; returns the step and
    the last preview, if there is one. All ranks call this. Rank 0 alone writes, and calls `on_save`."""
    config = task.config
    rank, world_size = initialise_ranks()
    config.check()
    check_same_run(run_dir, config)
    task.start(run_dir, device, rank, world_size)
    checkpoint, start, train = task.checkpoint, task.start_step, task.config.train
    if start and rank == 0:
        print(f"resuming at step {start} of {train.total_steps} in {run_dir}")
    if rank == 0:
        write(run_dir / "config.json", lambda f: f.write(json.dumps(config.to_record(), indent=1).encode()))
    steps_per_epoch = max(len(task.data) // (train.batch_size * world_size), 1)
    metrics = Metrics(run_dir / "metrics.jsonl", start) if rank == 0 else None
    asked_to_stop = StopOfAnyRank(stop, start)

    def save(step: int, fid: float | None = None) -> None:
        if metrics:
            task.write_back()
            record = {"epoch": step // steps_per_epoch, "seed": train.seed, "fid": fid, "config": config.to_record()}
            record |= {"batch_size": train.batch_size, "world_size": world_size}
            checkpoint.save(step, **record, **task.checkpoint_record())
            metrics.draw(run_dir / "loss.png")
            if on_save:
                on_save(run_dir)

    if config.init_from and not task.state:
        save(0)
    step, losses, preview, clock = start, [], None, time.perf_counter()
    rates = task.optimizer.learning_rate(Tensor(np.arange(train.total_steps, dtype=np.int32))).asnumpy()
    with tqdm(total=train.total_steps, initial=start, unit="step", disable=rank > 0, dynamic_ncols=True) as bar:
        bar.set_postfix_str("compiling" if start < train.total_steps else "finished")
        for batch in task.batches():
            loss, norm, extras = task.advance(batch, step)
            losses.append(loss)
            step += task.steps_per_call
            bar.update(task.steps_per_call)
            last = step == train.total_steps
            stopping = asked_to_stop(step, last)
            if step % train.log_every == 0 or last or stopping:
                mean = float(np.mean([value.asnumpy() for value in losses]))
                rate = len(losses) * task.steps_per_call * train.batch_size * world_size / (time.perf_counter() - clock)
                if not np.isfinite(mean):
                    raise UserError(
                        f"the loss is {mean} at step {step}: resume from the last checkpoint with a lower --train.lr"
                    )
                bar.set_postfix_str(f"loss {mean:.4f}, {rate:.0f} {task.unit}/s")
                if metrics:
                    grad_norm, lr, epoch = float(norm.asnumpy()), float(rates[step - 1]), step / steps_per_epoch
                    more = {name: float(value.asnumpy()) for name, value in extras.items()}
                    metrics.append(step=step, loss=mean, grad_norm=grad_norm, lr=lr, img_per_s=rate, epoch=epoch, **more)
                losses, clock = [], time.perf_counter()
            if stopping:
                break
            if step % train.sample_every == 0 or last:
                bar.set_postfix_str("sampling")
                preview = task.preview(step)
                clock = time.perf_counter()
            fid, is_best = task.score(step), False
            if metrics and fid is not None:
                best = best_checkpoint(run_dir)
                metrics.append(step=step, fid=fid)
                is_best = best is None or fid < read_state(best)["fid"]
                clock = time.perf_counter()
            if step % train.save_every == 0 or last or is_best:
                save(step, fid)
                clock = time.perf_counter()
    stopped = asked_to_stop(step, last=True)
    if stopped and step > start:
        save(step)
    if not stopped:
        preview = preview or task.preview(step)
    return step, preview


class StopOfAnyRank:
    """Whether a rank has been asked to stop. The ranks ask each other about once a second, and at the last step, so that all
    of them stop at the same step. With one rank it is the event itself."""

    def __init__(self, stop: threading.Event, step: int):
        self.stop, self.step, self.next, self.clock = stop, step, step, time.perf_counter()

    def __call__(self, step: int, last: bool = False) -> bool:
        if ranks()[1] == 1:
            return self.stop.is_set()
        if step < self.next and not last:
            return False
        seconds = (time.perf_counter() - self.clock) / max(step - self.step, 1)
        stops, slowest = gather(np.array([self.stop.is_set(), seconds], np.float32)).max(0)
        self.step, self.next, self.clock = step, step + min(max(int(1 / slowest), 1), 1000), time.perf_counter()
        if stops:
            self.stop.set()
        return bool(stops)


def check_same_run(run_dir: Path, config: Config) -> None:
    """Refuse a folder that holds another run: only the location of the data and the training options may change.
    The UserError names what differs."""
    record = run_dir / "config.json"
    if not record.exists():
        return
    old, new = fixed_parts(Config.from_json(record)), fixed_parts(config)
    if part := next((name for name in old.keys() | new.keys() if old.get(name) != new.get(name)), None):
        raise UserError(f"{run_dir} holds a run with another {part}: use another --run-dir, or the command it began with")


def fixed_parts(config: Config) -> dict[str, Any]:
    """What stays the same in a run."""
    record = config.to_record()
    fixed = {name: record.get(name) for name in ("kind", "model", "diffusion", "precision")}
    fixed |= {"data": record["data"] | {"dir": None}, "seed": record["train"]["seed"]}
    return fixed | {f"--{name.replace('_', '-')}": record.get(name) for name in ("first_stage_patch", "latent_scale")}


class Metrics:
    """metrics.jsonl: a line of numbers every `log_every` steps. Lines after the step that a run resumes at are dropped."""

    def __init__(self, path: Path, start: int):
        self.path, self.rows = path, []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:  # a crash cut the last line
                break
            if row["step"] <= start:
                self.rows.append(row)
        write(path, lambda f: f.write("".join(json.dumps(row) + "\n" for row in self.rows).encode()))

    def append(self, **row: float) -> None:
        self.rows.append(row)
        with open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")

    def draw(self, path: Path) -> None:
        steps, losses = ([row[key] for row in self.rows if "loss" in row] for key in ("step", "loss"))
        scores = [(row["step"], row["fid"]) for row in self.rows if "fid" in row]
        if steps:
            save_loss_curve(path, steps, losses, scores)
