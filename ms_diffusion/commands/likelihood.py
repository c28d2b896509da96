"""Bits per dimension of images under a run: `likelihood runs/quick --num 64`. Lower is better."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import tyro

from mindspore import Tensor

from ..denoiser import make_denoiser
from ..fields import AT_LEAST_1, NON_NEGATIVE, Bounds, check_fields
from ..files import check_output, write_json
from ..likelihood import (
    bits_per_dim,
    dequantised_bits_per_dim,
    make_divergence,
    ode_log_likelihood,
    ode_timesteps,
    random_terms,
)
from ..progress import ProgressBar
from ..randomness import Random, RowsRandom
from ..runtime import DEVICES, UserError, alone, command, gather, ranks
from ..training.pipeline import load
from .parse import parse


@dataclass
class Args:
    """Bits per dimension of images under a trained run: lower is better."""

    run: Annotated[str, tyro.conf.Positional]
    """A run's folder, one of its checkpoints, or the name of a bundled model."""
    num: Annotated[int, AT_LEAST_1] = 64
    """Number of images from the data set."""
    seed: Annotated[int, NON_NEGATIVE] = 0
    """Seed that chooses the images and draws the noise."""
    batch_size: Annotated[int, AT_LEAST_1] = 64
    """Images per batch."""
    split: Literal["test", "train"] = "test"
    """Split of the data set."""
    weights: Literal["ema", "model"] = "ema"
    """Weights of the network: their moving average, or as trained."""
    method: Literal["bound", "ode"] = "bound"
    """The variational bound over all timesteps, or the probability-flow ODE."""
    steps: Annotated[int, Bounds(2)] | None = None
    """Timesteps of the ODE, with two network calls each, by default 100. Or random timesteps of the bound for each batch,
    whose result is right on average; by default all timesteps."""
    device: Literal[DEVICES] = "auto"
    """Device: auto is Ascend, then GPU, then CPU."""
    json: str | None = None
    """Path of a file for the result; by default it is only printed."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> int:
    args = parse(Args, argv, prog=command("likelihood"))
    check_fields(args)
    if args.json:
        check_output(args.json)
    run = load(args.run, args.weights, device=args.device)
    pictures, conditions = run.task.likelihood_data(args.split)
    diffusion, name, ode = run.diffusion, run.config.data.name, args.method == "ode"
    T, is_random = diffusion.num_timesteps, args.steps is not None and not ode
    steps = args.steps or (min(100, T) if ode else T)
    if not 2 <= steps <= T:
        raise UserError(f"--steps is {steps}: choose from 2 to {T}, the run's number of timesteps")
    if args.num > len(pictures):
        raise UserError(f"--num is {args.num}: {name} has only {len(pictures)} images in its {args.split} split")

    rng = np.random.default_rng(args.seed)
    chosen = rng.permutation(len(pictures))[: args.num]
    timesteps = ode_timesteps(diffusion, steps) if ode else range(steps)
    calls = 2 * len(timesteps) - 2 if ode else steps
    rank, world_size = ranks()
    bar = ProgressBar(total=-(-args.num // args.batch_size) * calls, unit="call", desc=args.method, disable=rank > 0)
    graph: Callable = make_divergence(diffusion, run.net) if ode else make_denoiser(diffusion, run.net)

    def evaluate(n: np.ndarray, cond: list[Tensor], rng: Random, counts: np.ndarray | None) -> list[np.ndarray]:
        """Images (B, C, H, W) of levels 0..255 -> the parts of their bits per dimension, (parts, B)."""
        if ode:
            x, probes = (n + rng.random(n.shape) - 0.5) / 127.5 - 1, rng.choice([-1.0, 1.0], n.shape)
            log_density = ode_log_likelihood(lambda x, t: graph(x, t, probes, *cond), diffusion, x, timesteps, watch)
            return [dequantised_bits_per_dim(log_density, n[0].size)]
        x = n / 127.5 - 1

        def denoise(x: np.ndarray, t: int) -> np.ndarray:
            return graph(Tensor(np.float32(x)), t, *cond).asnumpy()

        bound = bits_per_dim(denoise, diffusion, x, rng, watch, counts)
        return [bound.prior, bound.terms[:, 1:].sum(1), bound.terms[:, 0]]

    def watch(t: int) -> None:
        bar.update()

    batches, clock = [], time.perf_counter()
    for first in range(0, args.num, args.batch_size):
        batch = chosen[first : first + args.batch_size]
        share = -(-len(batch) // world_size)  # of each rank
        own = np.minimum(np.arange(rank * share, (rank + 1) * share), len(batch) - 1)
        cond = [Tensor(values) for values in run.task.in_order({k: v[batch[own]] for k, v in conditions.items()})]
        counts = random_terms(T, steps, rng) if is_random else None
        with alone():
            rows = RowsRandom([(rng, len(batch), own)])
            found = evaluate(pictures[batch[own]].transpose(0, 3, 1, 2), cond, rows, counts)
        batches.append(gather(np.stack(found)).swapaxes(0, 1).reshape(len(found), -1)[:, : len(batch)])
    bar.close()
    if rank:
        return 0
    parts = np.concatenate(batches, 1)
    bits = parts.sum(0)
    # The images of a batch share their random timesteps, so only whole batches are independent
    independent = np.array([batch.sum(0).mean() for batch in batches]) if is_random else bits
    error = independent.std(ddof=1) / math.sqrt(len(independent)) if len(independent) > 1 else math.nan
    print(f"{bits.mean():.4f} +- {error:.4f} bits per dimension, mean and standard error over {args.num} images")
    if not ode:
        print("of which prior {:.4f}, KL terms {:.4f}, decoder (t = 0) {:.4f}".format(*parts.mean(1)))
    kind = f"{args.method}, {len(timesteps)} {'random timesteps' if is_random else 'timesteps'}"
    what = f"{name}, {args.split} split, seed {args.seed}; {kind}"
    protocol, seconds = f"{args.run} at step {run.step}, {args.weights} weights; {what}", time.perf_counter() - clock
    print(f"{protocol}; {seconds:.1f} s")
    if args.json:
        record = {"protocol": protocol, "num": args.num, "bits_per_dim": bits.mean(), "standard_error": error}
        write_json(args.json, record | {"parts": list(parts.mean(1)), "seconds": round(seconds, 1)})
    return 0
