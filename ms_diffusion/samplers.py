"""Samplers: from x_T to x_0 through `denoise(x_t, t) -> x_0`.

x is a Tensor or a numpy array of any shape; a sampler only adds and scales, with float64 coefficients. `timesteps` are
descending ints in [0, T), by default all T. `randn_like(x)` draws N(0, 1); `callback(i, x, x_start)` sees each step.
"""

import math

import numpy as np

from mindspore import Tensor


def sampling_timesteps(T: int, steps: int) -> list[int]:
    """`steps` descending timesteps from T - 1 to 0, evenly spaced (one step: T - 1 alone).

    Raises:
        ValueError: steps is not in [1, T].
    """
    if not 1 <= steps <= T:
        raise ValueError(f"{steps} sampling steps: choose from 1 to {T}, the timesteps of training")
    return [int(t) for t in np.round(np.linspace(T - 1, 0, steps))]


def _pairs(diffusion, timesteps):
    """(i, t, alpha_bar_t, alpha_bar of the next, less noisy time); after the last comes the data, alpha_bar 1."""
    timesteps = list(range(diffusion.T - 1, -1, -1) if timesteps is None else timesteps)
    alpha_bars = [float(diffusion.alphas_cumprod[t]) for t in timesteps]
    return list(zip(range(len(timesteps)), timesteps, alpha_bars, [*alpha_bars[1:], 1.0], strict=True))


def sample_ddpm(denoise, x, diffusion, timesteps=None, randn_like=None, callback=None):
    """Ancestral sampling (Ho et al. 2020, algorithm 2), on fewer steps by the posterior between them (Nichol & Dhariwal
    2021, section 4)."""
    for i, t, alpha_bar, alpha_bar_next in _pairs(diffusion, timesteps):
        x_start = denoise(x, t)
        alpha = alpha_bar / alpha_bar_next
        x = (
            math.sqrt(alpha_bar_next) * (1 - alpha) / (1 - alpha_bar) * x_start
            + math.sqrt(alpha) * (1 - alpha_bar_next) / (1 - alpha_bar) * x
        )
        if alpha_bar_next < 1:
            beta, v = 1 - alpha, diffusion.v_posterior
            sigma = math.sqrt(beta * ((1 - v) * (1 - alpha_bar_next) / (1 - alpha_bar) + v))
            x = x + sigma * randn_like(x)
        if callback:
            callback(i, x, x_start)
    return x


def sample_ddim(denoise, x, diffusion, timesteps=None, randn_like=None, callback=None, eta: float = 0.0):
    """DDIM (Song et al. 2020, eq. 12): deterministic at eta = 0, DDPM's noise at eta = 1."""
    for i, t, alpha_bar, alpha_bar_next in _pairs(diffusion, timesteps):
        x_start = denoise(x, t)
        eps_scale = 1 / math.sqrt(1 - alpha_bar)
        sigma = eta * math.sqrt((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next))
        direction = math.sqrt(1 - alpha_bar_next - sigma**2)
        x = (math.sqrt(alpha_bar_next) - direction * eps_scale * math.sqrt(alpha_bar)) * x_start + direction * eps_scale * x
        if sigma > 0:
            x = x + sigma * randn_like(x)
        if callback:
            callback(i, x, x_start)
    return x


SAMPLERS = {"ddpm": sample_ddpm, "ddim": sample_ddim}


class SeededNoise:
    """Standard normal noise for the images `indices` of a seed: image i draws the same numbers in any batch."""

    def __init__(self, seed: int, indices):
        self.generators = [np.random.default_rng((seed, i)) for i in indices]

    def __call__(self, shape) -> np.ndarray:
        """One draw of `shape` for each image -> (len(indices), *shape) float32."""
        return np.stack([g.standard_normal(shape, dtype=np.float32) for g in self.generators])


def generate(sampler, denoise, diffusion, timesteps, shape, num, seed=0, batch_size=64, callback=None) -> np.ndarray:
    """`num` samples of `shape` -> (num, *shape) float32, in equal batches, so that the network is compiled once."""
    batch_size = min(batch_size, num)
    batches = []
    for first in range(0, num, batch_size):
        noise = SeededNoise(seed, range(first, first + batch_size))
        x = Tensor(noise(shape))
        x = sampler(denoise, x, diffusion, timesteps, lambda x, noise=noise: Tensor(noise(x.shape[1:])), callback)
        batches.append(x.asnumpy())
    return np.concatenate(batches)[:num]
