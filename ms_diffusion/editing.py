"""Editing images with a trained denoiser: functions over `denoise(x_t, t) -> x_0`, as in `samplers`.

Two other edits need no function here. Image to image (SDEdit, Meng et al. 2022, algorithm 1) is a sampler that starts from
an image noised by `q_sample`: see `generate(start=)`. Plain inpainting is any sampler with the denoiser `inpaint`.
"""

import math

import numpy as np

from .denoiser import Array, Denoiser
from .process import DATA, Process
from .samplers import Callback, RandnLike, Timesteps, ddpm_step, noise_levels


def sample_repaint(denoise: Denoiser, x: Array, diffusion: Process, timesteps: Timesteps = None,
        randn_like: RandnLike = None, callback: Callback = None, jump_length: int = 10,
        jump_n_sample: int = 10, v_posterior: float | None = None) -> Array:  # fmt: skip
    """RePaint (Lugmayr et al. 2022, algorithm 1): ancestral sampling that makes each section of `jump_length` steps
    `jump_n_sample` times, and returns to its start by adding noise. So the painted part comes to agree with the known part.

    Pass `inpaint(denoise, known, mask)` as the denoiser: it keeps the known part. The network is called about
    `jump_n_sample` times per timestep. `v_posterior` is as in `sample_ddpm`.

    Raises ValueError if jump_length or jump_n_sample is below 1, or v_posterior is not in [0, 1]."""
    if jump_length < 1 or jump_n_sample < 1:
        raise ValueError(f"jump_length is {jump_length} and jump_n_sample is {jump_n_sample}: both must be at least 1")
    v_posterior = diffusion.v_posterior if v_posterior is None else v_posterior
    levels = noise_levels(diffusion, timesteps)
    calls = 0
    for first in range(0, len(levels), jump_length):
        section = levels[first : first + jump_length]
        for repeat in range(jump_n_sample):
            if repeat:  # return from the end of the section to its start with one draw from q(x_t | x_s)
                more, less = section[0][2], section[-1][3]
                x = more.alpha / less.alpha * x + math.sqrt(more.variance_after(less)) * randn_like(x)
            for _, t, level, following in section:
                x_start = denoise(x, t)
                x = ddpm_step(x, x_start, level, following, v_posterior, randn_like)
                if callback:
                    callback(calls, x, x_start)
                calls += 1
    return x


def invert_ddim(denoise: Denoiser, x: Array, diffusion: Process, timesteps: Timesteps = None, iterations: int = 3) -> Array:
    """The x_T from which `sample_ddim` with the same timesteps reaches the image x (Song et al. 2020, section 4.3).

    A DDIM step rotates x_t: x_next = cos x_t - sin v(x_t) (Salimans & Ho 2022, appendix D), where x_t is divided by the
    root of alpha^2 + sigma^2. Fixed-point iteration, starting with v at x_next, solves it for x_t; each iteration calls the
    network once. A single iteration equals, to first order, the usual inversion (Dhariwal & Nichol 2021, appendix F), which
    uses eps and could not be iterated near zero SNR.

    Raises ValueError if iterations is below 1, or one step leads from pure noise to data, which cannot be inverted."""
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}: it must be at least 1")
    last = getattr(diffusion, "last_level", DATA)  # where the last step of `sample_ddim` leads
    for _, t, level, following in reversed(noise_levels(diffusion, timesteps, last)):
        scale, scale_next = math.hypot(*level), math.hypot(*following)
        alpha, sigma, alpha_next, sigma_next = (
            level.alpha / scale,
            level.sigma / scale,
            *(each / scale_next for each in following),
        )
        cos, sin = alpha * alpha_next + sigma * sigma_next, sigma * alpha_next - alpha * sigma_next
        if cos == 0:
            raise ValueError("one step from pure noise to data cannot be inverted: use more timesteps")
        start = x_t = x / scale_next  # x has the noise of the following level
        for _ in range(iterations):
            v = (alpha * x_t - denoise(scale * x_t, t)) / sigma
            x_t = (start + sin * v) / cos
        x = scale * x_t
    return x


def slerp(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """Spherical interpolation between two arrays of noise: a at share 0, b at share 1, and noise of the same norm between
    them, which keeps it Gaussian (Shoemake 1985; Song et al. 2020, appendix D.5)."""
    cosine = float((a * b).sum() / math.sqrt((a**2).sum() * (b**2).sum()))
    angle = math.acos(min(max(cosine, -1.0), 1.0))
    if angle < 1e-6 or math.pi - angle < 1e-6:  # (anti)parallel: no unique great circle
        return (1 - share) * a + share * b
    return (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)
