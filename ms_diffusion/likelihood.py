"""The likelihood of images under a model, in bits per dimension: the variational bound, and the probability-flow ODE.

x (B, ...) are float64 numpy arrays; images are in [-1, 1], on the 256 levels n / 127.5 - 1. The denoisers here take and
return numpy arrays, and one timestep t for the whole batch. `callback(t)` is called after each call of the denoiser.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import log_ndtr

import mindspore as ms
from mindspore import Tensor, nn, ops

from .denoiser import evaluation_mode
from .process import Process, predict
from .randomness import Random
from .runtime import compiled

Callback = Callable[[int], Any] | None

# The variational bound


@dataclass(frozen=True)
class Bound:
    """The variational bound of each image and its parts, in bits per dimension."""

    total: np.ndarray  # (B,) prior + sum of the terms
    terms: np.ndarray  # (B, T) at t > 0: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at 0: -log p(x_0 | x_1), the decoder
    prior: np.ndarray  # (B,) KL(q(x_T | x_0) || N(0, 1))
    mse: np.ndarray  # (B, T) squared error of the predicted x_0, mean over dimensions; not in bits


def bits_per_dim(denoise: Callable[[np.ndarray, int], np.ndarray], diffusion: Process, x_start: np.ndarray,
        rng: Random, callback: Callback = None, counts: np.ndarray | None = None) -> Bound:  # fmt: skip
    """The variational bound on -log p(x_0), estimated with one draw of each x_t (Ho et al. 2020, eqs. 5 and 13; evaluated as
    in Nichol & Dhariwal 2021). The reverse variance is the diffusion's; t = 0, where it may be 0, uses that of t = 1.

    Args:
        denoise: `(x_t, t) -> x_0`.
        x_start: images (B, ...).
        rng: draws the noise, starting with t = T - 1.
        counts: how often the term of each timestep counts, (T,), by default once. Terms that do not count are not computed
            (0 in the result); if the expectation of the counts is 1, that of the bound is unchanged (`random_terms`).

    Raises ValueError if x_start is not on the 256 levels."""
    x_start = np.asarray(x_start, np.float64)
    levels = (x_start + 1) * 127.5
    if not (abs(levels - np.clip(np.round(levels), 0, 255)) < 1e-3).all():
        raise ValueError("x_start is not on the 256 levels n / 127.5 - 1, n = 0..255: pass 8-bit images")
    T = diffusion.num_timesteps
    q_variance = diffusion.q_variance
    p_variance = diffusion.posterior_variance.copy()
    p_variance[0] = p_variance[1] if T > 1 else diffusion.added[0]

    counts = np.ones(T) if counts is None else counts
    nats, mse = np.zeros((2, len(x_start), T))
    for t in np.flatnonzero(counts)[::-1].tolist():
        alpha, sigma = diffusion.level(t)
        x_t = alpha * x_start + sigma * rng.standard_normal(x_start.shape)
        predicted = np.asarray(denoise(x_t, t), np.float64)
        mse[:, t] = _mean((predicted - x_start) ** 2)
        if t > 0:  # the terms of x_t in the means of q and p cancel
            ratio = q_variance[t] / p_variance[t]
            squares = diffusion.posterior_mean_coef1[t] ** 2 * mse[:, t]
            nats[:, t] = (ratio - 1 - math.log(ratio) + squares / p_variance[t]) / 2
        else:  # the mean is the predicted x_0
            nats[:, 0] = -_mean(log_level(x_start, predicted, math.sqrt(p_variance[0])))
        if callback:
            callback(t)
    terms = counts * nats / math.log(2)
    alpha_bar = diffusion.alphas_cumprod[-1]  # of x_T over its standard deviation for data of variance 1
    prior = (alpha_bar * (_mean(x_start**2) - 1) - math.log1p(-alpha_bar)) / (2 * math.log(2))
    return Bound(prior + terms.sum(1), terms, prior, mse)


def random_terms(T: int, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Counts (T,) for `bits_per_dim`: 1 at t = 0 and, of each of steps - 1 equal parts of the other timesteps, the length
    of the part at one of its timesteps. Raises ValueError if steps is not in [2, T]."""
    if not 2 <= steps <= T:
        raise ValueError(f"steps is {steps}: choose from 2 to {T}, the number of timesteps")
    ends = np.round(np.linspace(1, T, steps)).astype(int)
    counts = np.zeros(T)
    counts[0], counts[rng.integers(ends[:-1], ends[1:])] = 1, np.diff(ends)
    return counts


def log_level(x: np.ndarray, mean: np.ndarray, std: float) -> np.ndarray:
    """log mass of N(mean, std^2) in the level around x; the levels -1 and 1 extend to infinity (Ho et al. 2020, eq. 13)."""
    low = np.where(x < -0.999, -np.inf, (x - 1 / 255 - mean) / std)
    high = np.where(x > 0.999, np.inf, (x + 1 / 255 - mean) / std)
    upper = low + high > 0  # mirrored into the lower tail, where a small mass is not a difference of numbers near 1
    large, small = log_ndtr(np.where(upper, -low, high)), log_ndtr(np.where(upper, -high, low))
    return large + np.log(-np.expm1(small - large))


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean of each image: (B, ...) -> (B,)."""
    return values.reshape(len(values), -1).mean(1)


# The probability-flow ODE


def ode_log_likelihood(denoise_and_divergence: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]],
        diffusion: Process, x: np.ndarray, timesteps: Sequence[int] | None = None,
        callback: Callback = None) -> np.ndarray:  # fmt: skip
    """log density (B,), in nats, at x (B, ...), of data with the noise of the first timestep: by the probability-flow ODE
    and the instantaneous change of variables (Song et al. 2021, eq. 39).

    In y = x / alpha and s = log(sigma / alpha) the ODE is dy/ds = y - x_0. Along it d log p(y)/ds = -(D - alpha div x_0) in
    D dimensions. D integrates exactly; with y's Jacobian at both ends

        log p(x) = log N(x_T; 0, alpha_T^2 + sigma_T^2) + D log(sigma_T / sigma_0) - integral alpha div x_0 ds

    Args:
        denoise_and_divergence: `(x_t, t) -> (x_0, divergence)`, (B, ...) and (B,), the trace of d x_0 / d x_t.
        timesteps: ascending ints in [0, T), by default all; x at the last is assumed to be normal, as of data of variance 1.

    Raises ValueError if timesteps are not ascending or out of range, or alpha is 0 at the last."""
    T = diffusion.num_timesteps
    steps = np.asarray(range(T) if timesteps is None else timesteps)
    if not len(steps) or steps[0] < 0 or steps[-1] >= T or (np.diff(steps) <= 0).any():
        raise ValueError(f"timesteps must be ascending ints from 0 to {T - 1}")
    levels = [diffusion.level(int(t)) for t in steps]
    scale, noise = (np.array(values) for values in zip(*levels, strict=True))
    if scale[-1] == 0:
        raise ValueError("alpha is 0 at the last timestep, so log sigma / alpha is infinite: leave out that timestep")
    sigma = noise / scale

    def slopes(y, i):
        """dy / dsigma, and the derivative of the integral by log sigma."""
        t = int(steps[i])
        x_start, divergence = denoise_and_divergence(scale[i] * y, t)
        if callback:
            callback(t)
        return (y - x_start) / sigma[i], scale[i] * divergence

    # Heun's method. y is integrated over sigma, not s: if x_0 is constant, y is linear in sigma but exponential in s
    y, integral = np.asarray(x, np.float64) / scale[0], np.zeros(len(x))
    for i in range(len(steps) - 1):
        step = sigma[i + 1] - sigma[i]
        dy, dintegral = slopes(y, i)
        dy_next, dintegral_next = slopes(y + step * dy, i + 1)
        y = y + step * (dy + dy_next) / 2
        integral += math.log(sigma[i + 1] / sigma[i]) * (dintegral + dintegral_next) / 2
    x_T = (scale[-1] * y).reshape(len(y), -1)
    variance = scale[-1] ** 2 + noise[-1] ** 2
    log_normal = -(x_T**2 / variance + math.log(2 * math.pi * variance)).sum(1) / 2
    return log_normal + x_T.shape[1] * math.log(noise[-1] / noise[0]) - integral


def ode_timesteps(diffusion: Process, steps: int) -> list[int]:
    """At most `steps` ascending timesteps from 0 to the last that holds data, evenly spaced in log sigma and rounded."""
    alpha_bar = diffusion.alphas_cumprod[diffusion.alphas_cumprod > 0]
    log_sigma = np.log(1 / alpha_bar - 1) / 2  # over alpha
    even = np.interp(np.linspace(log_sigma[0], log_sigma[-1], steps), log_sigma, np.arange(len(alpha_bar)))
    return [int(t) for t in np.unique(np.round(even))]


def make_divergence(diffusion: Process, net: nn.Cell) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Compile `(x_t, t, probes, *cond) -> (x_0, divergence)`, with the network in evaluation mode.

    x_0 (B, ...) is unclipped. The divergence (B,) is e^T (d x_0 / d x_t) e, an unbiased estimate if the probes e (B, ...)
    have mean 0 and covariance 1, such as random signs (Hutchinson 1990). Use the same probes along one ODE: its integrand is
    smooth only then. `cond` are Tensors, the other arguments numpy arrays."""

    def projected(x_t, t, probes, *cond):
        x_start = diffusion.predict_start(predict(net, x_t, t, cond), x_t, t)
        return ops.sum(x_start * probes), x_start

    gradient = ms.value_and_grad(projected, 0, None, has_aux=True)

    def both(x_t, t, probes, *cond):
        (_, x_start), product = gradient(x_t, t, probes, *cond)
        return x_start, product

    graph = compiled(both)

    def denoise_and_divergence(x_t: np.ndarray, t: int, probes: np.ndarray, *cond: Tensor) -> tuple[np.ndarray, np.ndarray]:
        times = Tensor(np.full(len(x_t), t, np.int32))
        with evaluation_mode(net):
            outputs = graph(Tensor(np.float32(x_t)), times, Tensor(np.float32(probes)), *cond)
        x_start, product = (out.asnumpy().astype(np.float64) for out in outputs)
        return x_start, (product * probes).reshape(len(probes), -1).sum(1)

    return denoise_and_divergence


def dequantised_bits_per_dim(log_density: np.ndarray, dims: int) -> np.ndarray:
    """Bits per dimension (B,) of images n = 0..255 from a log density (B,), in nats, at x = (n + u) / 127.5 - 1: a level is
    1 / 127.5 wide. If u is uniform in [-1/2, 1/2), the expectation is an upper bound (Theis et al. 2016, section 3.1)."""
    return math.log2(127.5) - np.asarray(log_density) / (dims * math.log(2))
