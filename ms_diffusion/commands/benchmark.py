"""``ms-diffusion benchmark``: how fast this machine trains and samples. ``benchmarks/`` compares it with PyTorch."""

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

import mindspore as ms
from mindspore import Tensor, nn, ops

from ..data.batches import Batches, load_images, make_dataset
from ..denoiser import make_denoiser
from ..fields import AT_LEAST_1, OneOf, check_fields
from ..files import write
from ..models.attention import Attention, LinearAttention
from ..process import predict
from ..randomness import antithetic_timesteps, offset_noise
from ..runtime import DEVICES, UserError, compiled, set_device
from ..samplers import SAMPLERS, generate, sample_ddim, sampling_timesteps
from ..training.presets import PRESETS
from ..training.step import EMA, make_optimizer, make_train_step
from .parse import parse
from .workers import Worker, Workers, alternate, ratio, verdict

SAMPLES = 64  # images that are drawn at once


class ImageWork:
    """A training step, a forward pass and DDIM sampling of an unconditional U-Net; each call waits for its result."""

    def __init__(self, config: Any, batch_size: int):
        self.net, self.diffusion = config.model.build(), config.diffusion.build()
        ema, optimizer = EMA(self.net), make_optimizer(self.net, 1e-3, 100, 10_000)
        rng, shape = np.random.default_rng(0), (batch_size, config.model.channels, config.data.size, config.data.size)
        self.x = Tensor(rng.random(shape, np.float32) * 2 - 1)
        self.t = Tensor(rng.integers(0, self.diffusion.num_timesteps, batch_size).astype(np.int32))
        self.noise = Tensor(rng.standard_normal(shape, np.float32))

        def loss_fn(x_start, t, noise):
            return self.diffusion.p_losses(self.net, x_start, t, noise)

        def forward(x, t):
            return predict(self.net, x, t)

        self.train_step, self.predict = make_train_step(loss_fn, optimizer, ema), compiled(forward)
        self.denoise = make_denoiser(self.diffusion, ema.net)

    def step(self) -> float:
        self.net.set_train(True)
        return float(self.train_step(self.x, self.t, self.noise)[0].asnumpy())

    def forward(self) -> np.ndarray:
        self.net.set_train(False)
        return self.predict(self.x, self.t).asnumpy()

    def sample(self, steps: int) -> np.ndarray:
        num, *shape = self.x.shape
        timesteps = sampling_timesteps(self.diffusion.num_timesteps, steps)
        return generate(sample_ddim, self.denoise, self.diffusion, timesteps, tuple(shape), num, batch_size=num)


class PointsWork:
    """A training epoch of points: batches and noise are drawn on the host, all steps run in one call."""

    def __init__(self, config: Any, batch_size: int):
        net, diffusion, rng = config.model.build(), config.diffusion.build(), np.random.default_rng(0)
        points = rng.random((config.data.num, 2), np.float32) * 2 - 1
        points = np.concatenate([points, points[: -len(points) % batch_size]])  # fill up the last batch
        self.steps, self.step, self.num_timesteps = len(points) // batch_size, 0, diffusion.num_timesteps
        self.batches = Batches(points, np.zeros(len(points), np.int32), batch_size, 10**9, 0, 0, False, 0, 1, 1)

        def loss_fn(x_start, t, noise):
            return diffusion.p_losses(net, x_start, t, noise)

        optimizer = make_optimizer(net, 1e-3, 100, 10**6)
        self.train_steps = make_train_step(loss_fn, optimizer, EMA(net), steps_per_call=self.steps)

    def draw(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x_start, t and noise of one training step."""
        x, rng = self.batches.batch(step)[0], np.random.default_rng((0, step))
        return x, antithetic_timesteps(rng, self.num_timesteps, len(x)), offset_noise(rng, x.shape, 0)

    def epoch(self) -> float:
        drawn = [self.draw(self.step + k) for k in range(self.steps)]
        self.step += self.steps
        return float(self.train_steps(*(Tensor(np.stack(values)) for values in zip(*drawn, strict=True)))[0].asnumpy())


WORKS = {  # what is timed of a preset
    "quick": ImageWork,
    "fashion-mnist": ImageWork,
    "fashion-mnist-resnet": ImageWork,
    "scurve": PointsWork,
    "scurve-seed": PointsWork,
}


@dataclass
class Args:
    """Time the data pipeline, compilation, the training step, the forward pass and sampling of presets, or trained runs."""

    presets: tuple[Annotated[str, OneOf(WORKS)], ...] = ("fashion-mnist", "fashion-mnist-resnet")
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


def make_work(work: type, config: Any, batch_size: int, device: str) -> Any:
    """What a worker process times."""
    set_device(device.lower())
    return work(config, batch_size)


Start = Callable[[type, Any, int, str], Workers]  # (work, config, batch size, device)


def start_workers(work: type, config: Any, batch_size: int, device: str) -> Workers:
    return Workers(mindspore=Worker(make_work, work, config, batch_size, device))


def measure(args: Args, device: str, start: Start = start_workers) -> list[dict[str, Any]]:
    """Time each preset and batch size and print each figure at once."""
    peak, records = matrix_peak(device), []
    print(f"matrix product: {peak / 1e9:.0f} GFLOP/s; data pipeline: {pipeline_rate():,.0f} images/s")
    for preset in args.presets:
        if WORKS[preset] is PointsWork:
            records.append(measure_points(args, device, preset, start))
            continue
        operations = count_operations(PRESETS[preset])
        print(f"\n{preset}: {operations / 1e6:.0f} million floating-point operations an image, forward")
        for batch_size in args.batch_sizes:
            records.append(measure_images(args, device, preset, batch_size, operations, peak, start))
    return records


def measure_images(
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


def measure_points(args: Args, device: str, preset: str, start: Start) -> dict[str, Any]:
    """Time an epoch of a preset of points with its own batch size."""
    num, batch_size = PRESETS[preset].data.num, PRESETS[preset].train.batch_size
    with start(PointsWork, PRESETS[preset], batch_size, device) as workers:
        times = alternate(workers, args.rounds, "epoch")
    seconds = float(np.median(times["mindspore"]))
    step = seconds / -(-num // batch_size)
    print(f"\n{preset}: an epoch of {num} points, batch {batch_size}: {seconds * 1e3:.1f} ms, {step * 1e6:.0f} us a step")
    print(f"    {verdict(times)}")
    return {"preset": preset, "batch_size": batch_size, "epoch": {"seconds": times, "ratio": ratio(times)}}


def measure_runs(args: Args, device: str) -> list[dict[str, Any]]:
    """Time how long each run takes to draw 64 images, decoding included, with the run's default guidance, in turns."""
    from ..training.runs import load

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


def main(argv: list[str] | None = None) -> int:
    args = parse(Args, argv=argv)
    return run(args, measure_runs if args.runs else measure)
