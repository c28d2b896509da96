"""``ms-diffusion benchmark``: how fast this machine trains and samples. ``benchmarks/`` compares it with PyTorch."""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import numpy as np

import mindspore as ms
from mindspore import Tensor, nn, ops

from ..data.batches import Batches, load_images, make_dataset
from ..fields import AT_LEAST_1, OneOf, check_fields
from ..files import write
from ..models.attention import Attention, LinearAttention
from ..process import predict
from ..runtime import DEVICES, UserError, command, compiled, set_device
from ..samplers import SAMPLERS
from ..sampling import Sampling
from ..training.presets import PRESETS
from ..training.runs import load
from .parse import parse
from .workers import Worker, Workers, alternate, ratio, verdict

SAMPLES = 64  # images that are drawn at once
MEASURES: dict[str, Callable[..., list[dict[str, Any]]]] = {}  # how each preset is timed; filled below


class Work:
    """Training calls of a run on the device; each waits for its result.

    Args:
        data: Training data in place of the configured data set, as `config.task` takes them.
        steps_per_call: Training steps in one call of the compiled function.
    """

    def __init__(self, config: Any, batch_size: int, data: Any = None, steps_per_call: int = 1):
        every = dict.fromkeys(("total_steps", "log_every", "sample_every", "save_every"), steps_per_call * 10**6)
        train = replace(config.train, batch_size=batch_size, steps_per_call=steps_per_call, **every)
        self.task = replace(config, train=train).task(data)
        with TemporaryDirectory() as run_dir:
            self.task.start(Path(run_dir))
        self.batches = Batches(self.task.data, self.task.labels, batch_size, 10**9, 0, 0, False, 0, 1, 1)

    def draw_batch(self, step: int) -> dict[str, np.ndarray]:
        return self.task.draw_batch(*self.batches.batch(step), step)

    def train(self, batch: dict[str, np.ndarray]) -> float:
        return float(self.task.advance(batch, 0)[0].asnumpy())


class ImageWork(Work):
    """A training step, a forward pass and DDIM sampling of random images, one batch of them."""

    def __init__(self, config: Any, batch_size: int):
        size = config.data.size
        images = np.random.default_rng(0).integers(0, 256, (batch_size, size, size, config.model.channels), np.uint8)
        super().__init__(config.with_data(images)[0], batch_size, (images, np.zeros(batch_size, np.int32)))
        self.batch, net = self.draw_batch(0), self.task.net
        self.num, self.inputs = batch_size, (Tensor(self.batch["x_start"]), Tensor(self.batch["t"]))

        def forward(x, t):
            return predict(net, x, t)

        self.predict = compiled(forward)

    def step(self) -> float:
        self.task.net.set_train(True)
        return self.train(self.batch)

    def forward(self) -> np.ndarray:
        self.task.net.set_train(False)
        return self.predict(*self.inputs).asnumpy()

    def sample(self, steps: int) -> np.ndarray:
        return self.task.draw(self.num, Sampling(sampler="ddim", steps=steps), self.num)


class PointsWork(Work):
    """A training epoch of points: batches and noise are drawn on the host, all steps run in one call."""

    def __init__(self, config: Any, batch_size: int):
        self.steps, self.step = math.ceil(config.data.num / batch_size), 0
        config = replace(config, data=replace(config.data, num=self.steps * batch_size))  # the last batch is full, too
        super().__init__(config, batch_size, steps_per_call=self.steps)

    def epoch(self) -> float:
        drawn = [self.draw_batch(self.step + k) for k in range(self.steps)]
        self.step += self.steps
        return self.train({name: np.stack([batch[name] for batch in drawn]) for name in drawn[0]})


@dataclass
class Args:
    """Time the data pipeline, compilation, the training step, the forward pass and sampling of presets, or trained runs."""

    presets: tuple[Annotated[str, OneOf(MEASURES)], ...] = ("fashion-mnist", "fashion-mnist-resnet")
    """Presets to time: quick, fashion-mnist (the annotated U-Net: dim 28, ConvNeXt blocks), fashion-mnist-resnet (ResNet
    blocks), scurve, scurve-seed. The last two are timed by epochs of 10,000 points."""
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
    """Device: auto is Ascend if present, otherwise GPU, otherwise CPU."""
    debug: bool = False
    """Show the traceback of an error."""


def make_work(work: type[Work], config: Any, batch_size: int, device: str) -> Work:
    """What a worker process times."""
    set_device(device.lower())
    return work(config, batch_size)


Start = Callable[[type[Work], Any, int, str], Workers]  # (work, config, batch size, device)


def start_workers(work: type[Work], config: Any, batch_size: int, device: str) -> Workers:
    return Workers(mindspore=Worker(make_work, work, config, batch_size, device))


def measure(args: Args, device: str, start: Start = start_workers) -> list[dict[str, Any]]:
    """Time each preset and print each figure at once."""
    peak = matrix_peak(device)
    print(f"matrix product: {peak / 1e9:.0f} GFLOP/s; data pipeline: {pipeline_rate():,.0f} images/s", flush=True)
    return [record for preset in args.presets for record in MEASURES[preset](args, device, preset, peak, start)]


def measure_images(args: Args, device: str, preset: str, peak: float, start: Start) -> list[dict[str, Any]]:
    """Time a preset of images with each batch size."""
    operations = count_operations(PRESETS[preset])
    print(f"\n{preset}: {operations / 1e6:.0f} million floating-point operations an image, forward")
    return [measure_batches(args, device, preset, size, operations, peak, start) for size in args.batch_sizes]


def measure_batches(
    args: Args, device: str, preset: str, batch_size: int, operations: int, peak: float, start: Start
) -> dict[str, Any]:
    """Time compilation, training step and forward pass; for the first batch size also sampling."""
    record: dict[str, Any] = {"preset": preset, "batch_size": batch_size, "operations": operations, "matrix_peak": peak}

    def timed(workers: Workers, rounds: int, key: str, *call: Any) -> tuple[float, str]:
        times = alternate(workers, rounds, *call)
        record[key] = {"seconds": times, "ratio": ratio(times)}
        return float(np.median(times["mindspore"])), verdict(times)

    with start(ImageWork, PRESETS[preset], batch_size, device) as workers:
        record["first_step"] = {name: worker.time("step") for name, worker in workers.items()}
        print(f"  batch {batch_size}: first step, compiled: {record['first_step']['mindspore']:.1f} s")
        for name, forward_passes in (("step", 3), ("forward", 1)):
            seconds, judged = timed(workers, args.rounds, name, name)
            if name == "step":
                record["memory"] = {side: worker.memory for side, worker in workers.items()}
            share = forward_passes * operations * batch_size / seconds / peak
            print(
                f"    {name:8} {seconds * 1e3:8.1f} ms {batch_size / seconds:8.0f} images/s  {share:4.0%} of the matrix "
                f"product's rate  {judged}"
            )
        print("    memory   " + ", ".join(f"{side} {memory:.0f} MiB" for side, memory in record["memory"].items()))
    if args.sampling_steps and batch_size == args.batch_sizes[0]:
        with start(ImageWork, PRESETS[preset], SAMPLES, device) as workers:
            for steps in args.sampling_steps:
                seconds, judged = timed(workers, min(args.rounds, 3), f"ddim-{steps}", "sample", steps)
                print(f"    DDIM-{steps}, {SAMPLES} images: {seconds:.2f} s, {SAMPLES / seconds:.1f} images/s  {judged}")
    return record


def measure_points(args: Args, device: str, preset: str, peak: float, start: Start) -> list[dict[str, Any]]:
    """Time an epoch of a preset of points with its own batch size."""
    num, batch_size = PRESETS[preset].data.num, PRESETS[preset].train.batch_size
    with start(PointsWork, PRESETS[preset], batch_size, device) as workers:
        times = alternate(workers, args.rounds, "epoch")
    seconds = float(np.median(times["mindspore"]))
    step = seconds / math.ceil(num / batch_size)
    print(f"\n{preset}: an epoch of {num} points, batch {batch_size}: {seconds * 1e3:.1f} ms, {step * 1e6:.0f} us a step")
    print(f"    {verdict(times)}")
    return [{"preset": preset, "batch_size": batch_size, "epoch": {"seconds": times, "ratio": ratio(times)}}]


MEASURES |= {
    "quick": measure_images,
    "fashion-mnist": measure_images,
    "fashion-mnist-resnet": measure_images,
    "scurve": measure_points,
    "scurve-seed": measure_points,
}


def measure_runs(args: Args, device: str) -> list[dict[str, Any]]:
    """Time how long each run takes to draw 64 images, decoding included, with the run's default guidance, in turns."""
    runs = {name: load(name) for name in args.runs}
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


def count_operations(config: Any) -> int:
    """Floating-point operations of one image's forward pass: those of convolutions, linear layers and attention products.

    A multiplication with its addition counts as 2. A training step takes three times as many.
    """
    total = 0

    def count(cell, inputs, output):
        nonlocal total
        if isinstance(cell, Attention | LinearAttention):
            pixels, heads = int(np.prod(inputs[0].shape[2:])), cell.heads
            width = cell.to_qkv.weight.shape[0] // 3  # heads times channels a head
            total += 4 * pixels * width * (pixels if isinstance(cell, Attention) else width // heads)
        else:
            shape = inputs[0].shape if isinstance(cell, nn.Conv2dTranspose) else output.shape
            total += 2 * cell.weight.size * int(np.prod(shape[2:], dtype=int))

    net = config.model.build()
    for _, cell in net.cells_and_names():
        if isinstance(cell, nn.Conv2d | nn.Conv2dTranspose | nn.Dense | Attention | LinearAttention):
            cell.register_forward_hook(count)
    size = config.data.size
    net(Tensor(np.zeros((1, config.model.channels, size, size), np.float32)), Tensor(np.zeros(1, np.int32)))
    return total


def matrix_peak(device: str, n: int = 2048) -> float:
    """Floating-point operations per second of the product of two n x n float32 matrices; on the CPU by NumPy."""
    a = np.random.default_rng(0).random((n, n), np.float32)
    b = a if device == "CPU" else Tensor(a)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        _ = b @ b if device == "CPU" else ops.matmul(b, b).asnumpy()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def pipeline_rate(batch_size: int = 64, steps: int = 300) -> float:
    """Images per second of the training data pipeline."""
    dataset = make_dataset(*load_images("fashion-mnist-mini", None, "train", 28, 1), batch_size, steps, flip=True)
    rows = dataset.create_tuple_iterator(output_numpy=True, num_epochs=1)
    next(rows)
    start = time.perf_counter()
    count = sum(len(row[0]) for row in rows)
    return count / (time.perf_counter() - start)


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"mindspore": ms.__version__, "python": platform.python_version()}
    return {"date": str(date.today()), "cpu": cpu, "cores": cores, "device": device, **versions}


def run(args: Args, measurement: Callable[[Any, str], list[dict[str, Any]]]) -> int:
    """Check the arguments, name the machine, measure, and write the figures to --json."""
    check_fields(args)
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: the folder does not exist; create it or choose another path")
    device = set_device(args.device)
    here = machine(device)
    print(", ".join(f"{key} {value}" for key, value in here.items()))
    records = measurement(args, device)
    if args.json:
        text = json.dumps({"machine": here, "records": records}, indent=1)
        write(args.json, lambda file: file.write(text.encode()))
    return 0


def main(argv: Sequence[str]) -> int:
    args = parse(Args, argv, prog=command("benchmark"))
    return run(args, measure_runs if args.runs else measure)
