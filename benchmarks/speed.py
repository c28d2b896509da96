"""How fast is it here: python -m ms_diffusion.benchmark --peer torch.

Each network and batch size is built in a process of its own, so that its peak memory is its own, and with `--peer torch`
in a second one by PyTorch in eager mode. The two are timed in turns, A/B/A/B, and while one works the other sleeps.

How good is a sampler for its calls of the network: `--samplers`, the errors of `sampler_errors`, the same on any machine.
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Literal

import numpy as np

from ms_diffusion import runtime
from ms_diffusion.commands import parse as cli
from ms_diffusion.runtime import DEVICES, UserError

# Not read from PRESETS, which would load MindSpore into PyTorch's process too
PRESET_NAMES = ("quick", "fashion-mnist", "fashion-mnist-resnet", "scurve", "scurve-seed")
SAMPLER_NAMES = ("ddpm", "ddim", "heun", "plms", "dpmpp_2m", "unipc")
WIDEST_SPREAD = 0.2  # of a ratio's rounds: between their quartiles, over their median


@dataclass
class Args:
    """Time the data pipeline, compilation, the forward pass, the training step and sampling."""

    presets: tuple[Literal[PRESET_NAMES], ...] = ("fashion-mnist", "fashion-mnist-resnet")
    """Networks: fashion-mnist is the annotated U-Net (dim 28, ConvNeXt), fashion-mnist-resnet has ResnetBlocks; scurve and
    scurve-seed are timed by epochs of 10,000 points."""
    batch_sizes: tuple[int, ...] = (32, 128)
    """Images a step."""
    rounds: int = 5
    """Turns of each side; the median counts."""
    sampling_steps: tuple[int, ...] = (10, 50)
    """DDIM steps for 64 images; none leaves sampling out."""
    peer: Literal["none", "torch"] = "none"
    """torch runs PyTorch beside, and prints ratios; it must be installed."""
    runs: tuple[str, ...] = ()
    """Time how trained runs draw 64 images instead, beside each other: in --sampling-steps, by --sampler."""
    sampler: Literal[SAMPLER_NAMES] = "dpmpp_2m"
    """Of --runs."""
    cost: str | None = None
    """Measure how the cost grows with batch, size and width instead, and draw it in this PNG."""
    samplers: bool = False
    """Print the error of each sampler after so many network calls instead."""
    picture: str | None = None
    """Draw the errors of --samplers in this PNG."""
    json: str | None = None
    """Write all figures to this file too."""
    device: Literal[DEVICES] = "auto"
    """Where to run; auto is Ascend, then GPU, then CPU."""
    debug: bool = False
    """Show the traceback of an error."""


class Work:
    """A training step, a forward pass and DDIM sampling of one network; each call waits for its result."""

    def __init__(self, model: dict, size: int, batch_size: int):
        from mindspore import Tensor

        from ms_diffusion import process as diffusion
        from ms_diffusion.denoiser import make_denoiser
        from ms_diffusion.models.unet import UnetConfig
        from ms_diffusion.training import step as training

        net, self.diffusion = UnetConfig(**model).build(), diffusion.DiffusionConfig().build()
        self.net, ema = net, training.EMA(net)
        optimizer = training.make_optimizer(net, 1e-3, 100, 10000)
        rng = np.random.default_rng(0)
        shape = (batch_size, model["channels"], size, size)
        self.batch = (
            Tensor(rng.random(shape, np.float32) * 2 - 1),
            Tensor(rng.integers(0, self.diffusion.num_timesteps, batch_size).astype(np.int32)),
            Tensor(rng.standard_normal(shape, np.float32)),
        )

        def loss_fn(x_start, t, noise):
            return self.diffusion.p_losses(net, x_start, t, noise)

        def predict(x, t):
            return diffusion.predict(net, x, t)

        self.train_step, self.predict = training.make_train_step(loss_fn, optimizer, ema), runtime.compiled(predict)
        self.denoise = make_denoiser(self.diffusion, ema.net)

    def step(self):
        self.net.set_train(True)
        return float(self.train_step(*self.batch)[0].asnumpy())

    def forward(self):
        self.net.set_train(False)
        return self.predict(*self.batch[:2]).asnumpy()

    def sample(self, steps: int):
        from ms_diffusion.samplers import generate, sample_ddim, sampling_timesteps

        shape = self.batch[0].shape
        timesteps = sampling_timesteps(self.diffusion.num_timesteps, steps)
        return generate(sample_ddim, self.denoise, self.diffusion, timesteps, shape[1:], shape[0], batch_size=shape[0])


class PointsWork:
    """An epoch of points for an MLP, as `train.py` makes it: batches and noise from the host, all steps in one call."""

    def __init__(self, model: dict, size: int, batch_size: int):
        from ms_diffusion import process as diffusion
        from ms_diffusion.data.batches import Batches
        from ms_diffusion.models.mlp import MLPConfig, ResidualMLPConfig
        from ms_diffusion.training import step as training

        net = (ResidualMLPConfig if "depth" in model else MLPConfig)(**model).build()
        process = diffusion.DiffusionConfig(model["timesteps"], "sigmoid", loss="l2").build()
        points = np.random.default_rng(0).random((size, 2), np.float32) * 2 - 1
        points = np.concatenate([points, points[: -size % batch_size]])  # the last batch of an epoch is filled up
        self.batches = Batches(points, np.zeros(len(points), np.int32), batch_size, 10**9, 0, 0, False, 0, 1, 1)
        self.steps, self.step, self.num_timesteps = len(points) // batch_size, 0, process.num_timesteps

        def loss_fn(x_start, t, noise):
            return process.p_losses(net, x_start, t, noise)

        optimizer = training.make_optimizer(net, 1e-3, 100, 10**6)
        self.train_steps = training.make_train_step(loss_fn, optimizer, training.EMA(net), steps_per_call=self.steps)

    def epoch(self):
        from mindspore import Tensor

        drawn = []
        for step in range(self.step, self.step + self.steps):
            x_start, rng = self.batches[step][0], np.random.default_rng((0, step))
            drawn.append(
                (
                    x_start,
                    randomness.antithetic_timesteps(rng, self.num_timesteps, len(x_start)),
                    randomness.offset_noise(rng, x_start.shape, 0),
                )
            )
        self.step += self.steps
        batch = [Tensor(np.stack(values)) for values in zip(*drawn, strict=True)]
        return float(self.train_steps(*batch)[0].asnumpy())


def count_operations(model: dict, size: int) -> int:
    """Floating-point operations (2 for a multiplication and addition) of one image's forward pass, from the layers' shapes:
    convolutions, linear layers and the products of attention. A training step takes three times as many."""
    from mindspore import Tensor, nn

    from ms_diffusion.models.attention import Attention, LinearAttention
    from ms_diffusion.models.unet import UnetConfig

    total = 0

    def count(cell, inputs, output):
        nonlocal total
        if isinstance(cell, Attention | LinearAttention):
            pixels, heads = int(np.prod(inputs[0].shape[2:])), cell.heads
            width = cell.to_qkv.weight.shape[0] // 3  # heads times channels a head
            total += 4 * pixels * width * (pixels if isinstance(cell, Attention) else width // heads)
        elif isinstance(cell, nn.Conv2dTranspose):
            total += 2 * cell.weight.size * int(np.prod(inputs[0].shape[2:]))
        else:
            total += 2 * cell.weight.size * int(np.prod(output.shape[2:], dtype=int))

    net = UnetConfig(**model).build()
    counted = (nn.Conv2d, nn.Conv2dTranspose, nn.Dense, Attention, LinearAttention)
    for _, cell in net.cells_and_names():
        if isinstance(cell, counted):
            cell.register_forward_hook(count)
    net(Tensor(np.zeros((1, model["channels"], size, size), np.float32)), Tensor(np.zeros(1, np.int32)))
    return total


def matrix_peak(device: str, n: int = 2048) -> float:
    """Floating-point operations a second of the product of two n x n float32 matrices: the CPU's by numpy."""
    from mindspore import Tensor, ops

    a = np.random.default_rng(0).random((n, n), np.float32)
    b = a if device == "CPU" else Tensor(a)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        c = b @ b if device == "CPU" else ops.matmul(b, b).asnumpy()
        seconds.append(time.perf_counter() - start)
    assert c.shape == (n, n)
    return 2 * n**3 / min(seconds)


def pipeline_rate(batch_size: int = 64, steps: int = 300) -> float:
    """Images a second of the training data pipeline."""
    from ms_diffusion.data.batches import load_images, make_dataset

    dataset = make_dataset(*load_images("fashion-mnist-mini", None, "train", 28, 1), batch_size, steps, flip=True)
    rows = dataset.create_tuple_iterator(output_numpy=True, num_epochs=1)
    next(rows)
    start = time.perf_counter()
    count = sum(len(row[0]) for row in rows)
    return count / (time.perf_counter() - start)


def peak_memory() -> float:
    """MiB: of the device, where it has its own memory, else of this process."""
    import resource

    if "mindspore" in sys.modules:
        import mindspore as ms

        if ms.get_context("device_target") != "CPU":
            return ms.runtime.max_memory_allocated() / 2**20
    elif sys.modules["torch"].cuda.is_available():
        return sys.modules["torch"].cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(side: str, device: str, model: str, size: str, batch_size: str) -> None:
    """The life of a worker process: a line `name argument...` on stdin, seconds and peak memory as JSON on stdout."""
    arguments = (json.loads(model), int(size), int(batch_size))
    is_unet = "channels" in arguments[0]
    if side == "torch":
        os.environ.pop("ONEDNN_MAX_CPU_ISA", None)  # which `runtime` sets for MindSpore; it would slow PyTorch
        from benchmarks import torch_peer

        kind = torch_peer.Work if is_unet else torch_peer.PointsWork
        work = kind(*arguments, device=device)
    else:
        runtime.set_device(device.lower())
        work = (Work if is_unet else PointsWork)(*arguments)
    for line in sys.stdin:
        name, *numbers = line.split()
        start = time.perf_counter()
        getattr(work, name)(*map(int, numbers))
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "memory": peak_memory()}), flush=True)


class Worker:
    """A process that times the calls of `Work`, of MindSpore or PyTorch."""

    def __init__(self, side: str, device: str, model: dict, size: int, batch_size: int):
        command = [sys.executable, "-m", "ms_diffusion.benchmark", "serve", side, device]
        command += [json.dumps(model), str(size), str(batch_size)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ),  # without the OMP_NUM_THREADS=1 of MindSpore's C++, which would hold PyTorch to one core
            cwd=Path(__file__).parents[1],
        )
        self.memory = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

    def time(self, *call) -> float:
        """Seconds of one call."""
        print(*call, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith('{"seconds"'):
                answer = json.loads(line)
                self.memory = answer["memory"]
                return answer["seconds"]
        raise UserError(f"{' '.join(map(str, call))} failed, see above: the batch may be too large for the memory")


@contextlib.contextmanager
def start_workers(peer: str, *arguments):
    """{side: Worker}, ours and the peer's if there is one, ended with the block."""
    with contextlib.ExitStack() as stack:
        sides = ["mindspore"] if peer == "none" else ["mindspore", peer]
        yield {side: stack.enter_context(Worker(side, *arguments)) for side in sides}


def alternate(workers: dict, rounds: int, *call) -> dict:
    """Seconds of `call` for each worker, in turns, after one that does not count: {side: [seconds, ...]}. A turn is the best
    of three, for the first wakes sleeping threads and caches; a long call needs no waking."""
    tries = {side: 3 if worker.time(*call) < 2 else 1 for side, worker in workers.items()}
    times = {side: [] for side in workers}
    for _ in range(rounds):
        for side, worker in workers.items():
            times[side].append(min(worker.time(*call) for _ in range(tries[side])))
    return times


def ratio(times: dict) -> tuple[float, float] | None:
    """(PyTorch's time / ours, spread of the rounds), None without a peer."""
    if "torch" not in times:
        return None
    ratios = np.divide(times["torch"], times["mindspore"])
    low, median, high = np.percentile(ratios, (25, 50, 75))
    return float(median), float((high - low) / median)


def verdict(pair) -> str:
    if pair is None:
        return ""
    value, spread = pair
    if spread > WIDEST_SPREAD:
        return f"no verdict: the rounds' ratios spread by {spread:.0%}; run it on a quiet machine"
    return f"{value:.2f}x PyTorch's speed (spread {spread:.0%})"


def measure(args: Args, device: str) -> list[dict]:
    """All figures of each preset and batch size, printed as they come."""
    from ms_diffusion.training.presets import PRESETS

    peak = matrix_peak(device)
    print(f"matrix product: {peak / 1e9:.0f} GFLOP/s; data pipeline: {pipeline_rate():,.0f} images/s")
    records = []
    for preset in args.presets:
        model = asdict(PRESETS[preset].model)
        if PRESETS[preset].is_points:
            records.append(measure_points(args, device, preset, model, PRESETS[preset]))
            continue
        size = PRESETS[preset].data.size
        operations = count_operations(model, size)
        print(f"\n{preset}: {operations / 1e6:.0f} million floating-point operations an image, forward")
        for batch_size in args.batch_sizes:
            records.append(measure_one(args, device, preset, model, size, batch_size, operations, peak))
    return records


def measure_one(args: Args, device, preset, model, size, batch_size, operations, peak) -> dict:
    record = {"preset": preset, "batch_size": batch_size, "operations": operations, "matrix_peak": peak}

    def timed(workers, rounds, key, *call) -> tuple[float, str]:
        """Record the rounds of a call; our median seconds and the verdict."""
        times = alternate(workers, rounds, *call)
        record[key] = {"seconds": times, "ratio": ratio(times)}
        return float(np.median(times["mindspore"])), verdict(record[key]["ratio"])

    with start_workers(args.peer, device, model, size, batch_size) as workers:
        record["first_step"] = {side: worker.time("step") for side, worker in workers.items()}
        print(f"  batch {batch_size}: first step, compiled: {record['first_step']['mindspore']:.1f} s")
        for name, share in (("step", 3), ("forward", 1)):
            seconds, judged = timed(workers, args.rounds, name, name)
            if name == "step":
                record["memory"] = {side: worker.memory for side, worker in workers.items()}
            rate = share * operations * batch_size / seconds
            print(
                f"    {name:8} {seconds * 1e3:8.1f} ms {batch_size / seconds:8.0f} images/s  {rate / peak:4.0%} of the "
                f"matrix product's rate  {judged}"
            )
        print("    memory   " + ", ".join(f"{side} {memory:.0f} MiB" for side, memory in record["memory"].items()))
    if args.sampling_steps and batch_size == args.batch_sizes[0]:
        with start_workers(args.peer, device, model, size, 64) as workers:
            for steps in args.sampling_steps:
                seconds, judged = timed(workers, min(args.rounds, 3), f"ddim-{steps}", "sample", steps)
                print(f"    DDIM-{steps}, 64 images: {seconds:.2f} s, {64 / seconds:.1f} images/s  {judged}")
    return record


def measure_points(args: Args, device, preset, model, config) -> dict:
    """An epoch of a preset of points, in its batch size."""
    num, batch_size = config.data.num, config.train.batch_size
    with start_workers(args.peer, device, model, num, batch_size) as workers:
        times = alternate(workers, args.rounds, "epoch")
    seconds = float(np.median(times["mindspore"]))
    step = seconds / -(-num // batch_size)
    print(f"\n{preset}: an epoch of {num} points, batch {batch_size}: {seconds * 1e3:.1f} ms, {step * 1e6:.0f} us a step")
    print(f"    {verdict(ratio(times))}")
    return {"preset": preset, "batch_size": batch_size, "epoch": {"seconds": times, "ratio": ratio(times)}}


def measure_runs(args: Args, device: str) -> list[dict]:
    """How long each run takes for 64 images, with the guidance that it has where none is given, in turns."""
    from ms_diffusion.sampling import Sampling, make_draw
    from ms_diffusion.training.presets import first_stage_of, load_run

    draws, num = {}, 64
    for name in args.runs:
        net, diffusion, config, _ = load_run(Path(name))
        if config.is_points or config.is_autoencoder or config.data.condition != "none":
            raise UserError(f"{name} draws no images of its own: give runs of images or latents")
        first_stage = first_stage_of(Path(name)) if config.is_latent else None
        for steps in args.sampling_steps:
            sampling = Sampling(sampler=args.sampler, steps=steps)
            sampling.settle(config, diffusion.num_timesteps)
            draws[name, steps] = make_draw(sampling, net, diffusion, config, first_stage)
    seconds = {key: [] for key in draws}
    for turn in range(args.rounds + 1):  # the first compiles
        for key, draw in randomness.items():
            start = time.perf_counter()
            draw(num, num)
            seconds[key] += [time.perf_counter() - start] if turn else []
    first, records = None, []
    for (name, steps), found in seconds.items():
        each = float(np.median(found)) / num
        first = first or each
        print(f"{name}, {args.sampler}, {steps} steps: {1000 * each:.2f} ms an image, {first / each:.2f}x the first's speed")
        records.append({"run": name, "sampler": args.sampler, "steps": steps, "ms_per_image": 1000 * each, "rounds": found})
    return records


# How the cost grows: each from (batch 16, size 32, dim 32)
SWEEPS = {"batch_size": (1, 4, 16, 64, 256), "size": (16, 32, 48, 64), "dim": (16, 32, 48, 64)}


def measure_cost(args: Args, device: str) -> list[dict]:
    """Seconds and memory of the annotated U-Net's step and forward pass over batch, size and width, as a table."""
    from ms_diffusion.training.presets import PRESETS

    records = []
    print("varied     value   step ms   forward ms   memory MiB")
    for varied, values in SWEEPS.items():
        for value in values:
            setting = {"batch_size": 16, "size": 32, "dim": 32, varied: value}
            model = asdict(replace(PRESETS["fashion-mnist"].model, dim=setting["dim"]))
            with Worker("mindspore", device, model, setting["size"], setting["batch_size"]) as worker:
                times = {
                    name: float(np.median(alternate({"mindspore": worker}, args.rounds, name)["mindspore"]))
                    for name in ("step", "forward")
                }
            records.append({"varied": varied, **setting, **times, "memory": worker.memory})
            print(f"{varied:10} {value:5} {times['step'] * 1e3:9.1f} {times['forward'] * 1e3:12.1f} {worker.memory:12.0f}")
    return records


def draw_cost(records: list[dict], path: Path) -> None:
    """One panel for each sweep: milliseconds over what was varied, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.5), layout="constrained")
    for axes, varied in zip(figure.subplots(1, 3, sharey=True), SWEEPS, strict=True):
        rows = [r for r in records if r["varied"] == varied]
        for name in ("step", "forward"):
            axes.loglog([r[varied] for r in rows], [r[name] * 1e3 for r in rows], "o-", label=name)
        axes.set_xticks([r[varied] for r in rows], [str(r[varied]) for r in rows])
        axes.minorticks_off()
        axes.set_xlabel(varied.replace("_", " "))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("ms")
    figure.axes[0].legend()
    figure.savefig(path, dpi=100)


def report_samplers(args: Args) -> None:
    from benchmarks import sampler_errors

    records = sampler_errors.measure_samplers()
    sampler_errors.print_table(records)
    if args.picture:
        sampler_errors.draw(records, Path(args.picture))
    if args.json:
        Path(args.json).write_text(json.dumps({"records": records}, indent=1))


def main() -> None:
    args = cli.parse(Args)
    if args.rounds < 1 or min(args.batch_sizes, default=0) < 1 or min(args.sampling_steps, default=1) < 1:
        raise UserError("--rounds, --batch-sizes and --sampling-steps must be at least 1")
    if args.peer == "torch":
        try:
            import torch  # noqa: F401
        except ImportError:
            raise UserError("--peer torch needs PyTorch: pip install torch==2.13.0, or leave --peer out") from None
    if bool(args.samplers) + bool(args.cost) + bool(args.runs) > 1:
        raise UserError("--samplers, --cost and --runs are different measurements: choose one")
    if args.picture and not args.samplers:
        raise UserError("--picture draws the errors of --samplers: add --samplers")
    for path in filter(None, (args.json, args.cost, args.picture)):
        if not Path(path).absolute().parent.is_dir():
            raise UserError(f"there is no folder for {path}: make it, or choose another path")
    if args.samplers:
        return report_samplers(args)
    device = runtime.set_device(args.device)
    import mindspore as ms

    machine = {"date": str(date.today()), "cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "device": device}
    machine |= {"mindspore": ms.__version__, "python": platform.python_version()}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    records = (measure_cost if args.cost else measure_runs if args.runs else measure)(args, device)
    if args.cost:
        draw_cost(records, Path(args.cost))
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine, "records": records}, indent=1))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(*sys.argv[2:])
    else:
        runtime.run_program(main)
