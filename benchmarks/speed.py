"""Compare the speed with PyTorch's: ``python -m benchmarks.speed --peer torch``.

Each network and batch size is built in two processes of its own, by us and by PyTorch in eager mode. They are timed in
turns, A/B/A/B, and while one works the other sleeps.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mindspore import Tensor, nn, ops

from ms_diffusion.commands import benchmark
from ms_diffusion.commands.benchmark import SAMPLES, WORKS, PointsWork, work_of
from ms_diffusion.commands.parse import parse
from ms_diffusion.data.batches import load_images, make_dataset
from ms_diffusion.models.attention import Attention, LinearAttention, TokenAttention
from ms_diffusion.runtime import UserError, run_program, set_device
from ms_diffusion.training.config import Config, config_from_record, override
from ms_diffusion.training.presets import PRESETS

from .workers import Worker, Workers, alternate, ratio, verdict


@dataclass
class Args(benchmark.Args):
    """Time the data pipeline, compilation, training step, forward pass, memory and sampling, also of PyTorch."""

    peer: Literal["none", "torch"] = "none"
    """torch also runs PyTorch, which must be installed, and prints ratios."""


def make_ours(record: dict[str, Any], batch_size: int, device: str) -> benchmark.Work:
    """What our worker times."""
    set_device(device)
    config = config_from_record(record)
    return WORKS[config.kind](config, batch_size)


def start_workers(config: Config, batch_size: int, device: str, peer: str = "none") -> Workers:
    """Our worker and, with --peer torch, PyTorch's; its oneDNN is not limited to AVX2, as `runtime` limits MindSpore's."""
    if peer != "none":
        config = override(config, optimizer="adam")  # as the peer trains
    call = (config.to_record(), batch_size, device)
    workers = Workers(mindspore=Worker("benchmarks.speed:make_ours", *call))
    if peer == "torch":
        workers["PyTorch"] = Worker("benchmarks.torch_work:make_work", *call, env={"ONEDNN_MAX_CPU_ISA": "DEFAULT"})
    return workers


def measure(args: Args) -> list[dict[str, Any]]:
    """Time each preset; figures are printed as they come."""
    peak = matrix_peak()
    print(f"matrix product: {peak / 1e9:.0f} GFLOP/s; data pipeline: {pipeline_rate():,.0f} images/s", flush=True)
    records = []
    for preset in args.presets:
        if work_of(preset) is PointsWork:
            records.append(measure_points(args, preset))
            continue
        operations = count_operations(PRESETS[preset])
        print(f"\n{preset}: {operations / 1e6:.0f} million floating-point operations an image, forward")
        records += [measure_images(args, preset, size, operations, peak) for size in args.batch_sizes]
    return records


def measure_images(args: Args, preset: str, batch_size: int, operations: int, peak: float) -> dict[str, Any]:
    """Time compilation, training step and forward pass; for the first batch size also sampling."""
    record: dict[str, Any] = {"preset": preset, "batch_size": batch_size, "operations": operations, "matrix_peak": peak}

    def timed(workers: Workers, rounds: int, key: str, *call: Any) -> tuple[float, str]:
        times = alternate(workers, rounds, *call)
        record[key] = {"seconds": times, "ratio": ratio(times)}
        return float(np.median(times["mindspore"])), verdict(times)

    with start_workers(PRESETS[preset], batch_size, args.device, args.peer) as workers:
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
        with start_workers(PRESETS[preset], SAMPLES, args.device, args.peer) as workers:
            for steps in args.sampling_steps:
                seconds, judged = timed(workers, min(args.rounds, 3), f"ddim-{steps}", "sample", steps)
                print(f"    DDIM-{steps}, {SAMPLES} images: {seconds:.2f} s, {SAMPLES / seconds:.1f} images/s  {judged}")
    return record


def measure_points(args: Args, preset: str) -> dict[str, Any]:
    """Time an epoch of a preset of points with its own batch size."""
    num, batch_size = PRESETS[preset].data.num, PRESETS[preset].train.batch_size
    with start_workers(PRESETS[preset], batch_size, args.device, args.peer) as workers:
        times = alternate(workers, args.rounds, "epoch")
    seconds = float(np.median(times["mindspore"]))
    step = seconds / math.ceil(num / batch_size)
    print(f"\n{preset}: an epoch of {num} points, batch {batch_size}: {seconds * 1e3:.1f} ms, {step * 1e6:.0f} us a step")
    print(f"    {verdict(times)}")
    return {"preset": preset, "batch_size": batch_size, "epoch": {"seconds": times, "ratio": ratio(times)}}


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
        elif isinstance(cell, TokenAttention):
            tokens, width = inputs[0].shape
            total += 4 * tokens * width * tokens
        elif isinstance(cell, nn.Dense):
            total += 2 * cell.weight.size * inputs[0].shape[0]
        else:
            shape = inputs[0].shape if isinstance(cell, nn.Conv2dTranspose) else output.shape
            total += 2 * cell.weight.size * int(np.prod(shape[2:], dtype=int))

    net = config.model.build()
    for _, cell in net.cells_and_names():
        if isinstance(cell, nn.Conv2d | nn.Conv2dTranspose | nn.Dense | Attention | LinearAttention | TokenAttention):
            cell.register_forward_hook(count)
    size = config.data.size
    labels = [Tensor(np.zeros(1, np.int32))] * (config.model.num_classes is not None)
    net(Tensor(np.zeros((1, config.model.channels, size, size), np.float32)), Tensor(np.zeros(1, np.int32)), *labels)
    return total


def matrix_peak(n: int = 2048) -> float:
    """Floating-point operations per second of the product of two n x n float32 matrices; on the CPU by NumPy."""
    a = np.random.default_rng(0).random((n, n), np.float32)
    b = a if set_device() == "CPU" else Tensor(a)
    seconds = benchmark.seconds_of(lambda: b @ b if b is a else ops.matmul(b, b).asnumpy(), 8)
    return 2 * n**3 / min(seconds)


def pipeline_rate(batch_size: int = 64, steps: int = 300) -> float:
    """Images per second of the training data pipeline."""
    dataset = make_dataset(*load_images("fashion-mnist-mini", None, "train", 28, 1), batch_size, steps, flip=True)
    rows = dataset.create_tuple_iterator(output_numpy=True, num_epochs=1)
    next(rows)
    start = time.perf_counter()
    count = sum(len(row[0]) for row in rows)
    return count / (time.perf_counter() - start)


def main(argv: Sequence[str]) -> int:
    args = parse(Args, argv)
    if args.peer == "torch":
        try:
            import torch  # noqa: F401
        except ImportError:
            raise UserError("--peer torch needs PyTorch: pip install torch==2.13.0, or omit --peer") from None
    return benchmark.run(args, measure)


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
