"""How probable a model finds images, in bits per dimension: python -m ms_diffusion.likelihood runs/quick --num 64.

x (B, ...): float64 numpy on the host; images lie in [-1, 1] on the 256 levels n / 127.5 - 1. A denoiser is an argument; it
takes and gives numpy arrays, and one timestep t for all. `callback(t)` sees each of its calls.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tqdm import tqdm

import mindspore as ms
from mindspore import Tensor, ops

from . import runtime
from .commands import parse as cli
from .data.batches import load_images
from .denoiser import make_denoiser
from .process import GaussianDiffusion, predict
from .runtime import DEVICES, UserError
from .training.presets import load_run

# The variational bound


@dataclass(frozen=True)
class Bound:
    """The variational bound of each image and its parts, in bits per dimension."""

    total: np.ndarray  # (B,) prior + the sum of terms
    terms: np.ndarray  # (B, T) at t: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at 0: -log p(x_0 | x_1), the decoder
    prior: np.ndarray  # (B,) KL(q(x_T | x_0) || N(0, 1))
    mse: np.ndarray  # (B, T) squared error of the predicted x_0, mean over dimensions; no bits


def bits_per_dim(denoise, diffusion: GaussianDiffusion, x_start, rng, callback=None) -> Bound:
    """The variational bound on -log p(x_0), by one draw of each x_t (Ho et al. 2020, eqs. 5 and 13; evaluated as by Nichol &
    Dhariwal 2021). The reverse variance is that of `diffusion`; at t = 0, where that may be 0, that of t = 1.

    `denoise(x_t, t) -> x_0`; x_start (B, ...); `rng.standard_normal(shape)` draws the noise, for t = T - 1 first.

    Raises:
        ValueError: x_start is not on the 256 levels.
    """
    x_start = np.asarray(x_start, np.float64)
    levels = (x_start + 1) * 127.5
    if not (abs(levels - np.clip(np.round(levels), 0, 255)) < 1e-3).all():
        raise ValueError("x_start is not on the 256 levels n / 127.5 - 1, n = 0..255: the bound is one of discrete images")
    T, alpha_bar = diffusion.num_timesteps, diffusion.alphas_cumprod
    q_variance = diffusion.betas * (1 - diffusion.alphas_cumprod_prev) / (1 - alpha_bar)
    p_variance = diffusion.posterior_variance.copy()
    p_variance[0] = p_variance[1] if T > 1 else diffusion.betas[0]

    nats, mse = np.empty((2, len(x_start), T))
    for t in range(T - 1, -1, -1):
        x_t = math.sqrt(alpha_bar[t]) * x_start + math.sqrt(1 - alpha_bar[t]) * rng.standard_normal(x_start.shape)
        predicted = np.asarray(denoise(x_t, t), np.float64)
        mse[:, t] = _mean((predicted - x_start) ** 2)
        if t > 0:  # the means of q and p share the part of x_t
            ratio = q_variance[t] / p_variance[t]
            squares = diffusion.posterior_mean_coef1[t] ** 2 * mse[:, t]
            nats[:, t] = (ratio - 1 - math.log(ratio) + squares / p_variance[t]) / 2
        else:  # the mean is the predicted x_0: nothing of x_t is left
            nats[:, 0] = -_mean(log_level(x_start, predicted, math.sqrt(p_variance[0])))
        if callback:
            callback(t)
    terms = nats / math.log(2)
    prior = (alpha_bar[-1] * (_mean(x_start**2) - 1) - math.log1p(-alpha_bar[-1])) / (2 * math.log(2))
    return Bound(prior + terms.sum(1), terms, prior, mse)


def log_level(x, mean, std):
    """log of the mass of N(mean, std^2) in the level around x, open to infinity at -1 and 1 (Ho et al. 2020, eq. 13)."""
    low = np.where(x < -0.999, -np.inf, (x - 1 / 255 - mean) / std)
    high = np.where(x > 0.999, np.inf, (x + 1 / 255 - mean) / std)
    mirror = low + high < 0  # into the upper tail, where a small mass is no difference of numbers near 1
    near, far = log_tail(np.where(mirror, -high, low)), log_tail(np.where(mirror, -low, high))
    return near + np.log(-np.expm1(far - near))


def log_tail(z):
    """log of the mass of N(0, 1) above z: by erfc, and beyond 35, where that nears underflow, by its asymptotic series."""
    erfc = np.vectorize(math.erfc, otypes=[np.float64])(np.minimum(z, 35) / math.sqrt(2))
    far = np.maximum(z, 35)
    series = np.log1p(-(1 - (3 - 15 / far**2) / far**2) / far**2)
    return np.where(z < 35, np.log(erfc / 2), series - far**2 / 2 - np.log(far * math.sqrt(2 * math.pi)))


def _mean(values):
    """Of each image: (B, ...) -> (B,)."""
    return values.reshape(len(values), -1).mean(1)


# The probability-flow ODE


def ode_log_likelihood(denoise_and_divergence, diffusion: GaussianDiffusion, x, timesteps=None, callback=None):
    """log density (B,) in nats, at x (B, ...), of the data with the noise of the first timestep: by the probability-flow ODE
    and the instantaneous change of variables (Song et al. 2021, eq. 39).

    In y = x / sqrt(alpha_bar) and s = log sigma, sigma^2 = (1 - alpha_bar) / alpha_bar, the ODE is dy/ds = y - x_0; along it
    d log p(y)/ds = -(D - sqrt(alpha_bar) div x_0) in D dimensions. D integrates exactly, so with y's Jacobians at both ends

        log p(x) = log N(x_T; 0, 1) + D/2 log((1 - alpha_bar_T) / (1 - alpha_bar_0)) - integral sqrt(alpha_bar) div x_0 ds

    Args:
        denoise_and_divergence: `(x_t, t) -> (x_0, divergence)`, (B, ...) and (B,), the trace of d x_0 / d x_t.
        timesteps: ascending ints in [0, T), by default all; at the last the data is taken for N(0, 1).

    Raises:
        ValueError: the timesteps are not such, or alpha_bar is 0 at the last.
    """
    timesteps = np.arange(diffusion.num_timesteps) if timesteps is None else np.asarray(timesteps)
    if not len(timesteps) or timesteps[0] < 0 or timesteps[-1] >= diffusion.num_timesteps or (np.diff(timesteps) <= 0).any():
        raise ValueError(f"timesteps must be ascending ints from 0 to {diffusion.num_timesteps - 1}")
    alpha_bar = diffusion.alphas_cumprod[timesteps]
    if alpha_bar[-1] == 0:
        raise ValueError("alpha_bar is 0 at the last timestep, so log sigma is infinite: end at one that holds data")
    scale, sigma = np.sqrt(alpha_bar), np.sqrt((1 - alpha_bar) / alpha_bar)

    def slopes(y, i):  # of y in sigma, of the integral in log sigma
        t = int(timesteps[i])
        x_start, divergence = denoise_and_divergence(scale[i] * y, t)
        if callback:
            callback(t)
        return (y - x_start) / sigma[i], scale[i] * divergence

    # Heun's method, for y in sigma: where x_0 is constant y is a straight line in it, in s an exponential
    y, integral = np.asarray(x, np.float64) / scale[0], np.zeros(len(x))
    for i in range(len(timesteps) - 1):
        step = sigma[i + 1] - sigma[i]
        dy, dintegral = slopes(y, i)
        dy_next, dintegral_next = slopes(y + step * dy, i + 1)
        y = y + step * (dy + dy_next) / 2
        integral += math.log(sigma[i + 1] / sigma[i]) * (dintegral + dintegral_next) / 2
    x_T = (scale[-1] * y).reshape(len(y), -1)
    log_normal = -(x_T**2 + math.log(2 * math.pi)).sum(1) / 2
    return log_normal + x_T.shape[1] / 2 * math.log((1 - alpha_bar[-1]) / (1 - alpha_bar[0])) - integral


def ode_timesteps(diffusion: GaussianDiffusion, steps: int) -> list[int]:
    """At most `steps` ascending timesteps from 0 to T - 1, as evenly spaced in log sigma as whole numbers can be."""
    log_sigma = np.log(1 / diffusion.alphas_cumprod - 1) / 2
    even = np.interp(np.linspace(log_sigma[0], log_sigma[-1], steps), log_sigma, np.arange(diffusion.num_timesteps))
    return [int(t) for t in np.unique(np.round(even))]


def make_divergence(diffusion: GaussianDiffusion, net):
    """`(x_t, t, probes, *cond) -> (x_0, divergence)`, compiled: x_0 (B, ...) unclipped and e^T (d x_0 / d x_t) e (B,), an
    unbiased estimate of the divergence for probes e (B, ...) of mean 0 and covariance 1, such as signs (Hutchinson 1990).

    Keep the probes along an ODE: the integrand is smooth only so. `cond` are Tensors, the rest is numpy.
    """
    net.set_train(False)

    def projected(x_t, t, probes, *cond):
        x_start = diffusion.predict_start(predict(net, x_t, t, cond), x_t, t)
        return ops.sum(x_start * probes), x_start

    gradient = ms.value_and_grad(projected, 0, None, has_aux=True)

    def both(x_t, t, probes, *cond):
        (_, x_start), product = gradient(x_t, t, probes, *cond)
        return x_start, product

    graph = runtime.compiled(both)

    def denoise_and_divergence(x_t, t: int, probes, *cond):
        times = Tensor(np.full(len(x_t), t, np.int32))
        outputs = graph(Tensor(np.float32(x_t)), times, Tensor(np.float32(probes)), *cond)
        x_start, product = (out.asnumpy().astype(np.float64) for out in outputs)
        return x_start, (product * probes).reshape(len(probes), -1).sum(1)

    return denoise_and_divergence


def dequantised_bits_per_dim(log_density, dims: int):
    """Bits per dimension (B,) of images n = 0..255 from a log density (B,) in nats at x = (n + u) / 127.5 - 1: a level is
    1 / 127.5 wide. For u uniform in [-1/2, 1/2) an upper bound, in expectation (Theis et al. 2016, section 3.1)."""
    return math.log2(127.5) - np.asarray(log_density) / (dims * math.log(2))


# The command


@dataclass
class Args:
    """Bits per dimension of images under a trained run: lower is better."""

    run: Annotated[str, tyro.conf.Positional]
    """A run's folder, or one of its checkpoints."""
    num: int = 64
    """How many images of the data set."""
    seed: int = 0
    """Chooses the images, and draws the noise."""
    batch_size: int = 64
    """Images at once."""
    split: Literal["test", "train"] = "test"
    """Which part of the data set."""
    weights: Literal["ema", "model"] = "ema"
    """The moving average, or the weights as trained."""
    method: Literal["bound", "ode"] = "bound"
    """The variational bound, over all timesteps, or the probability-flow ODE."""
    steps: int = 100
    """Timesteps of the ODE, two network calls each."""
    device: Literal[DEVICES] = "auto"
    """Where to run; auto is Ascend, then GPU, then CPU."""
    debug: bool = False
    """Show the traceback of an error."""


def main() -> int:
    args = cli.parse(Args)
    if min(args.num, args.batch_size) < 1 or args.seed < 0:
        raise UserError("--num and --batch-size must be at least 1, --seed at least 0")
    device = runtime.set_device(args.device)
    net, diffusion, config, step = load_run(Path(args.run), args.weights)
    data, model, ode = config.data, config.model, args.method == "ode"
    if config.is_points:
        raise UserError(f"{args.run} is of points in the plane: bits per dimension are for images")
    if config.is_latent or config.is_autoencoder:
        raise UserError(f"{args.run} works through latents, whose likelihood is not the images'")
    if model.cond_channels or model.self_condition:
        raise UserError(f"{args.run} is conditioned on images, which the likelihood is not made for")
    if ode and not 2 <= args.steps <= diffusion.num_timesteps:
        raise UserError(
            f"--steps {args.steps}: choose from 2 to {diffusion.num_timesteps}, the timesteps this run was trained with"
        )
    if ode and diffusion.alphas_cumprod[-1] == 0:
        raise UserError("this run's last timestep holds no data (zero terminal SNR), as the ODE needs: use --method bound")
    pictures, labels = load_images(data.name, data.dir, args.split, data.size, model.channels)
    if args.num > len(pictures):
        raise UserError(f"--num {args.num}: {data.name} has only {len(pictures)} images in its {args.split} split")

    rng = np.random.default_rng(args.seed)
    chosen = rng.permutation(len(pictures))[: args.num]
    timesteps = ode_timesteps(diffusion, args.steps) if ode else range(diffusion.num_timesteps)
    calls = 2 * len(timesteps) - 2 if ode else diffusion.num_timesteps
    bar = tqdm(total=-(-args.num // args.batch_size) * calls, unit="call", desc=f"{args.method} on {device}")
    graph = make_divergence(diffusion, net) if ode else make_denoiser(diffusion, net)

    def evaluate(n, cond):
        """Images (B, C, H, W) of levels 0..255 -> the parts of their bits per dimension, (parts, B)."""
        if ode:
            x, probes = (n + rng.random(n.shape) - 0.5) / 127.5 - 1, rng.choice([-1.0, 1.0], n.shape)
            log_density = ode_log_likelihood(lambda x, t: graph(x, t, probes, *cond), diffusion, x, timesteps, watch)
            return [dequantised_bits_per_dim(log_density, n[0].size)]
        bound = bits_per_dim(
            lambda x, t: graph(Tensor(np.float32(x)), t, *cond).asnumpy(), diffusion, n / 127.5 - 1, rng, watch
        )
        return [bound.prior, bound.terms[:, 1:].sum(1), bound.terms[:, 0]]

    def watch(t):
        bar.update()

    batches, clock = [], time.perf_counter()
    for first in range(0, args.num, args.batch_size):
        batch = chosen[first : first + args.batch_size]
        cond = (Tensor(labels[batch]),) if model.num_classes else ()
        batches.append(evaluate(pictures[batch].transpose(0, 3, 1, 2), cond))
    bar.close()
    parts = np.concatenate(batches, 1)
    bits = parts.sum(0)
    error = bits.std(ddof=1) / math.sqrt(args.num) if args.num > 1 else math.nan
    print(f"{bits.mean():.4f} +- {error:.4f} bits per dimension, mean and standard error over {args.num} images")
    if not ode:
        print("of which prior {:.4f}, KL terms {:.4f}, decoder (t = 0) {:.4f}".format(*parts.mean(1)))
    print(
        f"{args.run} at step {step}, {args.weights} weights; {data.name}, {args.split} split, seed {args.seed}; "
        f"{args.method}, {len(timesteps)} timesteps; {time.perf_counter() - clock:.1f} s on {device}"
    )
    return 0


if __name__ == "__main__":
    runtime.run_program(main)
