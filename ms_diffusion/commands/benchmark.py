"""How fast this machine trains and samples: `benchmark --presets quick`. `benchmarks/` compares it with PyTorch."""

import gc
import json
import math
import os
import platform
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

import mindspore as ms
from mindspore import Tensor

from ..data.batches import make_dataset, random_images
from ..fields import AT_LEAST_1, OneOf, check_fields
from ..files import check_output, temporary_folder, write
from ..process import predict
from ..runtime import DEVICES, UserError, command, compiled, set_device
from ..samplers import SAMPLERS
from ..sampling import Sampling
from ..training.pipeline import load
from ..training.presets import PRESETS
from .parse import parse

SAMPLES = 64  # images that are drawn at once


class Work:
    """Training calls of a run on the device, of `steps_per_call` steps each; every call waits for its result.
    `data` are training data in place of the configured data set, as `config.task` takes them."""

    def __init__(self, config: Any, batch_size: int, data: Any = None, steps_per_call: int = 1):
        every = dict.fromkeys(("total_steps", "log_every", "sample_every", "save_every"), steps_per_call * 10**6)
        train = replace(config.train, batch_size=batch_size, steps_per_call=steps_per_call, **every)
        self.task = replace(config, train=train).task(data)
        with temporary_folder() as folder:
            self.task.start(folder)
        rows: Any = make_dataset(self.task.data, self.task.labels, batch_size, 10**9).source
        self.rows = enumerate(rows)

    def draw_batch(self) -> dict[str, np.ndarray]:
        """The batch of the next step."""
        step, (x, labels) = next(self.rows)
        return self.task.draw_batch(x, labels, step)

    def train(self, batch: dict[str, np.ndarray]) -> float:
        return float(self.task.advance(batch, 0)[0].asnumpy().mean())


class ImageWork(Work):
    """A training step, a forward pass and DDIM sampling of random images, one batch of them."""

    def __init__(self, config: Any, batch_size: int):
        data = random_images(batch_size, config.data.size, config.model.channels)
        super().__init__(config.with_data(data.images)[0], batch_size, data)
        self.batch, net = self.draw_batch(), self.task.net
        self.num = batch_size
        self.inputs = [Tensor(self.batch[name]) for name in ("x_start", "t", *self.task.cond_fields)]

        def forward(x, t, *cond):
            return predict(net, x, t, cond)

        self.predict = compiled(forward)

    def step(self) -> float:
        self.task.net.set_train(True)
        return self.train(self.batch)

    def forward(self) -> np.ndarray:
        self.task.net.set_train(False)
        return self.predict(*self.inputs).asnumpy()

    def sample(self, steps: int) -> np.ndarray:
        return self.task.draw(self.num, Sampling(sampler="ddim", steps=steps, guidance=1.0), self.num)


class PointsWork(Work):
    """A training epoch of points: batches and noise are drawn on the host, all steps run in one call."""

    def __init__(self, config: Any, batch_size: int):
        self.steps = math.ceil(config.data.num / batch_size)
        config = replace(config, data=replace(config.data, num=self.steps * batch_size))  # the last batch is full, too
        super().__init__(config, batch_size, steps_per_call=self.steps)

    def epoch(self) -> float:
        drawn = [self.draw_batch() for _ in range(self.steps)]
        return self.train({name: np.stack([batch[name] for batch in drawn]) for name in drawn[0]})


WORKS: dict[str, type[Work]] = {"pixels": ImageWork, "points": PointsWork}  # by the kind of run


@dataclass
class Args:
    """Time the training step and sampling of presets, or how fast trained runs draw images."""

    presets: tuple[Annotated[str, OneOf(PRESETS)], ...] = ("fashion-mnist", "fashion-mnist-resnet")
    """Presets to time, of images in pixel space or of points, which are timed by epochs of all points."""
    batch_sizes: tuple[Annotated[int, AT_LEAST_1], ...] = (32, 128)
    """Images in a training step."""
    rounds: Annotated[int, AT_LEAST_1] = 5
    """Rounds of each measurement; the median is printed."""
    sampling_steps: tuple[Annotated[int, AT_LEAST_1], ...] = (10, 50)
    """Numbers of DDIM steps to time for 64 images; no number skips sampling."""
    runs: tuple[str, ...] = ()
    """Trained runs. Instead of presets, time how fast each draws 64 images in --sampling-steps steps of --sampler."""
    sampler: Annotated[str, OneOf(SAMPLERS)] = "dpmpp_2m"
    """Sampler for --runs."""
    json: str | None = None
    """Also write all figures to this file."""
    device: Literal[DEVICES] = "auto"
    """Device: auto is Ascend, then GPU, then CPU."""
    debug: bool = False
    """Show the traceback of an error."""


def work_of(preset: str) -> type[Work]:
    """What is timed of a preset. Raises UserError if the preset needs a trained first stage or data of its own."""
    kind, kinds = PRESETS[preset].kind, " and ".join(WORKS)
    if kind not in WORKS:
        raise UserError(f"--presets {preset}: only presets of {kinds} can be timed; time a trained run, --runs")
    return WORKS[kind]


def seconds_of(call: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each of `rounds` calls, after one that does not count."""
    return timeit.repeat(call, gc.enable, number=1, repeat=rounds + 1)[1:]


def measure(args: Args) -> list[dict[str, Any]]:
    """Time each preset; figures are printed as they come."""
    records: list[dict[str, Any]] = []

    def note(preset: str, batch_size: int, what: str, images: int, call: Callable[[], Any]) -> None:
        found = seconds_of(call, args.rounds)
        median = float(np.median(found))
        print(f"{preset}, batch {batch_size}: {what} {median * 1e3:.1f} ms, {images / median:.0f} samples/s", flush=True)
        records.append({"preset": preset, "batch_size": batch_size, "what": what, "seconds": found})

    for preset in args.presets:
        config, kind = PRESETS[preset], work_of(preset)
        if kind is PointsWork:
            epoch = PointsWork(config, config.train.batch_size)
            note(preset, config.train.batch_size, "epoch", len(epoch.task.data), epoch.epoch)
            continue
        for batch_size in args.batch_sizes:
            work = ImageWork(config, batch_size)
            note(preset, batch_size, "training step", batch_size, work.step)
            note(preset, batch_size, "forward pass", batch_size, work.forward)
        work = ImageWork(config, SAMPLES)
        for steps in args.sampling_steps:
            note(preset, SAMPLES, f"DDIM-{steps}", SAMPLES, lambda work=work, steps=steps: work.sample(steps))
    return records


def measure_runs(args: Args) -> list[dict[str, Any]]:
    """Time how long each run takes to draw 64 images, decoding included, with the run's default guidance, in turns."""
    runs = {name: load(name, device=args.device) for name in args.runs}
    seconds: dict[tuple[str, int], list[float]] = {(name, steps): [] for name in runs for steps in args.sampling_steps}
    for turn in range(args.rounds + 1):  # the first compiles
        for (name, steps), found in seconds.items():
            start = time.perf_counter()
            runs[name].sample(SAMPLES, sampler=args.sampler, steps=steps, batch_size=SAMPLES)
            if turn:
                found.append(time.perf_counter() - start)
    medians, records = {key: float(np.median(found)) / SAMPLES for key, found in seconds.items()}, []
    first = next(iter(medians.values()), 0.0)
    for (name, steps), each in medians.items():
        print(f"{name}, {args.sampler}, {steps} steps: {1000 * each:.2f} ms an image, {first / each:.2f}x the first's speed")
        record = {"run": name, "sampler": args.sampler, "steps": steps, "ms_per_image": 1000 * each}
        records.append({**record, "rounds": seconds[name, steps]})
    return records


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if os.access(cpuinfo, os.R_OK) else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"mindspore": ms.__version__, "python": platform.python_version()}
    return {"date": str(date.today()), "cpu": cpu, "cores": cores, "device": device, **versions}


def run(args: Any, measurement: Callable[[Any], list[dict[str, Any]]]) -> int:
    """Check the arguments, name the machine, measure, and write the figures to --json."""
    check_fields(args)
    check_output(args.json)
    here = machine(set_device(args.device))
    print(", ".join(f"{key} {value}" for key, value in here.items()))
    text = json.dumps({"machine": here, "records": measurement(args)}, indent=1)
    if args.json:
        write(args.json, lambda file: file.write(text.encode()))
    return 0


def main(argv: Sequence[str]) -> int:
    args = parse(Args, argv, prog=command("benchmark"))
    return run(args, measure_runs if args.runs else measure)
