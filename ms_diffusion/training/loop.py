"""The training loop of every kind of run: steps, log, previews, scores, checkpoints; and its Python function, `train()`."""

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from mindspore import Tensor

from ..fields import check_fields
from ..files import read_bytes, write, write_json
from ..images import save_loss_curve
from ..locks import sole_writer
from ..progress import ProgressBar
from ..runtime import (
    Interrupted,
    UserError,
    barrier,
    defer_interrupts,
    gather,
    given_up,
    initialise_ranks,
    ranks,
    set_device,
)
from .checkpoint import best_checkpoint, read_config, read_state, score_of
from .config import Config, override
from .events import Events, import_tensorboard
from .presets import PRESETS
from .runs import Run
from .tasks.base import Logged, Task

OnSave = Callable[[Path], None] | None
MOST_SKIPPED = 50  # steps in a row without a finite loss; fp16 needs 16 to bring its loss scale down to 1


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
    if not isinstance(run_dir, str | Path) or not str(run_dir).strip():
        raise UserError(f"run_dir is {run_dir!r}: give the folder of the run")
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
    the last preview, or None if training was stopped before it. All ranks call this. Rank 0 alone writes, and calls
    `on_save`. Raises UserError if another process trains this run."""
    rank, world_size = initialise_ranks()
    task.config.check()
    if task.config.train.tensorboard:
        import_tensorboard()
    with sole_writer(run_dir) if rank == 0 else nullcontext() as check_lock:
        check_same_run(run_dir, task.config)
        task.start(run_dir, device, rank, world_size)
        defer_interrupts()  # until here there is nothing to save
        return Training(task, stop, check_lock, on_save).run()


class Training:
    """One call of `train_task`: steps, log, checkpoints, previews and scores.

    A checkpoint is written before the preview and the score of its step, which may fail or be interrupted. Its state.json
    says whether these are still missing (`unfinished`); a run that resumes there makes them first. So a run that was killed
    at any moment and started again ends with the same files as one that was not."""

    def __init__(self, task: Task, stop: threading.Event, check_lock: Callable[[], None] | None, on_save: OnSave):
        self.task, self.train, self.run_dir, self.start = task, task.config.train, task.run_dir, task.start_step
        self.check_lock, self.on_save, state = check_lock, on_save, task.state or {}
        self.asked_to_stop = StopOfAnyRank(stop, self.start)
        self.may_give_up = stop.is_set if task.world_size == 1 else lambda: False  # ranks cannot leave one by one
        self.steps_per_epoch = max(len(task.data) // (self.train.rows_per_step * task.world_size), 1)
        self.saved, self.preview, self.is_finished = self.start if task.state else -1, None, False
        self.losses = Losses(**state.get("losses", {}))
        self.metrics = Metrics(self.run_dir / "metrics.jsonl", self.start) if task.rank == 0 else None
        if self.metrics and self.train.tensorboard:
            is_finished = not state.get("unfinished")
            self.metrics.events = Events(self.run_dir, self.metrics.rows, self.start, is_finished)

    def run(self) -> tuple[int, Path | None]:
        task, train, step, preview = self.task, self.train, self.start, None
        if step and self.metrics:
            print(f"resuming at step {step} of {train.total_steps} in {self.run_dir}")
        if self.metrics:
            write_json(self.run_dir / "config.json", task.config.to_record())
        if task.config.init_from and not task.state:
            self.save(0)
        options = {"unit": "step", "disable": task.rank > 0, "dynamic_ncols": True}
        with ProgressBar(total=train.total_steps, initial=step, **options) as bar:
            bar.set_postfix_str("compiling" if step < train.total_steps else "finished")
            with contextlib.suppress(Interrupted), given_up(self.may_give_up):
                if (task.state or {}).get("unfinished"):
                    self.finish(step, bar)
                step, stopped = self.train_steps(step, bar)
                if not stopped or self.is_finished:  # it may be asked to stop when all is done
                    preview = self.preview or task.preview(step)
        return step, preview

    def train_steps(self, step: int, bar: ProgressBar) -> tuple[int, bool]:
        """The step that was reached, and whether training was asked to stop there."""
        task, train, losses, due = self.task, self.train, self.losses, False
        clock = time.perf_counter()
        for batch in task.batches():
            try:
                loss, norm, extras = task.advance(batch, step)
                losses.add(loss)
                step += task.steps_per_call
                bar.update(task.steps_per_call)
                last = step == train.total_steps
                stopping = self.asked_to_stop(step, last)
                if step % train.log_every == 0 or last:
                    self.log(step, norm, extras, time.perf_counter() - clock, bar)
                    clock = time.perf_counter()
                due = due or step % train.save_every == 0 or last or stopping
                if due or losses.are_many():
                    self.check_losses(step)
                if due and (losses.in_a_row == 0 or last or stopping):  # else these weights may be what spoils the loss
                    self.save(step)
                    due, clock = False, time.perf_counter()
                if stopping:
                    break
                if self.is_due(step):
                    self.finish(step, bar)
                    clock = time.perf_counter()
            except (OSError, Interrupted) as e:  # of the log, the preview or the score: no step must be lost by it
                if step > self.saved and losses.in_a_row == 0:
                    self.save(step)
                if isinstance(e, OSError):
                    raise
                return step, True
        return step, self.asked_to_stop(step, last=True)

    def log(self, step: int, norm: Tensor, extras: Logged, seconds: float, bar: ProgressBar) -> None:
        task, losses = self.task, self.losses
        losses.read()
        names = [name for group in extras for name in group]
        numbers = [numbers.asnumpy().reshape(-1) for numbers in extras.values()]
        means = gather(np.concatenate(numbers)).mean(0).tolist() if names else []  # over the ranks
        rate = losses.steps * self.train.rows_per_step * task.world_size / seconds
        skipped = f", {losses.skipped} steps skipped" if losses.skipped else ""
        bar.set_postfix_str(f"loss {losses.mean():.4f}, {rate:.0f} {task.unit}/s{skipped}")
        if self.metrics:
            row = {"loss": losses.mean(), "grad_norm": float(norm.asnumpy()), "lr": self.learning_rate(), "img_per_s": rate}
            row |= {"epoch": step / self.steps_per_epoch}
            row |= zip(names, means, strict=True)
            row |= {"skipped": losses.skipped} if losses.skipped else {}
            self.metrics.append(step=step, **{name: value for name, value in row.items() if math.isfinite(value)})
        losses.reset()

    def learning_rate(self) -> float:
        """The learning rate of the last step that was not skipped."""
        optimizer = self.task.optimizer
        step = np.maximum(optimizer.global_step.asnumpy() - 1, 0)
        return float(optimizer.learning_rate(Tensor(step)).asnumpy().squeeze())

    def check_losses(self, step: int) -> None:
        """Read the losses that the device still has. Raises UserError after too many steps in a row that were skipped."""
        self.losses.read()
        if self.losses.in_a_row >= MOST_SKIPPED:
            kept = f"the checkpoint of step {self.saved} stands" if self.saved >= 0 else "nothing was saved"
            raise UserError(
                f"{self.losses.in_a_row} steps in a row, up to step {step}, had a loss or gradients that are not finite, so "
                f"training has diverged; {kept}. Run the same command with a lower --train.lr, or look at the data"
            )

    def save(self, step: int, **scores: float) -> None:
        """Write the checkpoint of a step. All ranks call this."""
        self.saved = step
        if not self.metrics or not self.check_lock:
            return
        task, train = self.task, self.train
        self.check_lock()
        task.write_back()
        self.metrics.sync()
        record = {"epoch": step // self.steps_per_epoch, "seed": train.seed, "fid": None, "losses": self.losses.state()}
        record |= {"batch_size": train.rows_per_step, "world_size": task.world_size, "config": task.config.to_record()}
        record |= {"unfinished": self.is_due(step), **task.checkpoint_record(), **scores}
        task.checkpoint.save(step, **record)
        if not (self.run_dir / "config.json").exists():  # the folder was removed or renamed
            write_json(self.run_dir / "config.json", task.config.to_record())
            task.keep_data()
        self.metrics.draw(self.run_dir / "loss.png")
        if self.on_save:
            self.on_save(self.run_dir)

    def is_due(self, step: int) -> bool:
        """Whether a preview, a score or a loss of held-out data belongs to a step."""
        task, train = self.task, self.train
        is_drawn = step % train.sample_every == 0 or step == train.total_steps
        return step > 0 and (is_drawn or task.is_scored(step) or task.is_validated(step))

    def finish(self, step: int, bar: ProgressBar) -> None:
        """Make the preview and the scores of a step, and save the step if its score is the best so far."""
        task, train = self.task, self.train
        if is_drawn := step % train.sample_every == 0 or step == train.total_steps:
            bar.set_postfix_str("sampling")
            self.preview = task.preview(step)
        scores = {}
        if task.is_scored(step):
            bar.set_postfix_str("scoring")
            scores = {"fid": task.score(step)}
        if task.is_validated(step):
            bar.set_postfix_str("validating")
            scores |= task.validate(step)
        if self.metrics and self.check_lock:
            is_best = False
            if scores:
                best = best_checkpoint(self.run_dir)
                is_best = best is None or score_of(scores) < score_of(read_state(best))
                if {"step": step, **scores} not in self.metrics.rows:  # or was logged before the run was killed here
                    self.metrics.append(step=step, **scores)
            if self.metrics.events and is_drawn:
                self.metrics.events.add_pictures(step)
            if self.saved == step:
                self.check_lock()
                task.checkpoint.update(step, unfinished=False, **scores)
                self.metrics.draw(self.run_dir / "loss.png")
            elif is_best:
                self.save(step, unfinished=False, **scores)
        self.is_finished = step == train.total_steps


class Losses:
    """The losses since the last line of the log. A step whose loss or gradients were not finite was skipped; its loss is
    NaN. `state` is saved with a checkpoint, so that the log of a run that resumes there goes on the same."""

    def __init__(self, total: float = 0.0, steps: int = 0, skipped: int = 0, in_a_row: int = 0):
        self.total, self.steps, self.skipped = total, steps, skipped
        self.in_a_row = in_a_row  # skipped steps up to the last one, also over lines of the log
        self.unread: list[Tensor] = []  # read late, since that waits for the device

    def add(self, loss: Tensor) -> None:
        self.unread.append(loss)

    def are_many(self) -> bool:
        return len(self.unread) >= MOST_SKIPPED

    def read(self) -> None:
        for value in (float(each) for loss in self.unread for each in loss.asnumpy().reshape(-1)):
            self.steps += 1
            self.in_a_row = 0 if math.isfinite(value) else self.in_a_row + 1
            self.total += value if math.isfinite(value) else 0.0
            self.skipped += not math.isfinite(value)
        self.unread.clear()

    def mean(self) -> float:
        return self.total / (self.steps - self.skipped) if self.steps > self.skipped else math.nan

    def reset(self) -> None:
        self.total, self.steps, self.skipped = 0.0, 0, 0

    def state(self) -> dict[str, float]:
        self.read()
        return {"total": self.total, "steps": self.steps, "skipped": self.skipped, "in_a_row": self.in_a_row}


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
    if not (found := read_config(run_dir)):
        return
    old, new = fixed_parts(found), fixed_parts(config)
    if part := next((name for name in old.keys() | new.keys() if old.get(name) != new.get(name)), None):
        raise UserError(f"{run_dir} holds a run with another {part}: use another --run-dir, or the command it began with")


def fixed_parts(config: Config) -> dict[str, Any]:
    """What stays the same in a run."""
    record = config.to_record()
    fixed = {name: record.get(name) for name in ("kind", "model", "diffusion", "precision")}
    fixed |= {"data": record["data"] | {"dir": None}, "seed": record["train"]["seed"]}
    fixed |= {f"--train.{name.replace('_', '-')}": record["train"].get(name) for name in ("lora_rank", "lora_targets")}
    return fixed | {f"--{name.replace('_', '-')}": record.get(name) for name in ("first_stage_patch", "latent_scale")}


class Metrics:
    """metrics.jsonl: a line of numbers every `log_every` steps. Lines after the step that a run resumes at are dropped, and
    lines that cannot be read, such as one that a crash has cut. What is appended goes to `events` too, if there are any."""

    events: Events | None = None

    def __init__(self, path: Path, start: int):
        self.path = path
        rows = parse_rows(read_bytes(path)) if path.exists() else []
        self.rows = [row for row in rows if row["step"] <= start]
        self.write()

    def write(self) -> None:
        write(self.path, lambda f: f.write("".join(json.dumps(row) + "\n" for row in self.rows).encode()))

    def append(self, **row: float) -> None:
        self.rows.append(row)
        if self.path.exists():
            with open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")
        else:  # the folder was removed or renamed
            self.write()
        if self.events:
            self.events.add(row)

    def sync(self) -> None:
        """Wait until all lines are on the disk. If the file was removed, it is written again."""
        if not self.path.exists():
            self.write()
        with open(self.path, "rb") as f:
            os.fsync(f.fileno())

    def draw(self, path: Path) -> None:
        if curves := loss_curves(self.rows):
            save_loss_curve(path, *curves)


def loss_curves(rows: list[dict[str, Any]]) -> tuple[list, list, list, list] | None:
    """What `images.loss_figure` draws of the rows of a metrics.jsonl: steps, losses, scores, and losses of held-out data.
    None before the first loss."""
    steps, losses = ([row[key] for row in rows if "loss" in row] for key in ("step", "loss"))
    scores = [(row["step"], row["fid"]) for row in rows if "fid" in row]
    both = [row for row in rows if {"val_loss", "val_loss_ema"} <= row.keys()]
    held = [(row["step"], row["val_loss"], row["val_loss_ema"]) for row in both]
    return (steps, losses, scores, held) if steps else None


def parse_rows(content: bytes) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl whose values are numbers that can be drawn."""
    rows = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                continue
            if all(type(value) in (int, float) and not abs(value) > 1e300 for value in row.values()):
                rows.append(row)
    return rows
