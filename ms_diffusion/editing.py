"""Editing images with a trained denoiser: plain functions over `denoise(x_t, t) -> x_0`, as in `samplers`.

Two more edits need no function here: image to image (SDEdit, Meng et al. 2022, algorithm 1) is a sampler that begins at
an image noised by `q_sample`, see `generate(start=)`; plain inpainting is any sampler over the denoiser `inpaint`.
"""

import math

from .samplers import ddpm_step, noise_levels


def sample_repaint(
    denoise, x, diffusion, timesteps=None, randn_like=None, callback=None, jump_length: int = 10, jump_n_sample: int = 10
):
    """RePaint (Lugmayr et al. 2022, algorithm 1): ancestral sampling that after every `jump_length` steps goes as many back
    by noising, and down again, `jump_n_sample` times in all, so that the painted part comes to agree with the known one.

    `denoise` holds the known part in place: `inpaint(denoise, known, mask)`. The network is called about `jump_n_sample`
    times a timestep.

    Raises:
        ValueError: jump_length or jump_n_sample is below 1.
    """
    if jump_length < 1 or jump_n_sample < 1:
        raise ValueError(f"jump_length {jump_length} and jump_n_sample {jump_n_sample} must be at least 1")
    levels = noise_levels(diffusion, timesteps)
    calls = 0
    for first in range(0, len(levels), jump_length):
        section = levels[first : first + jump_length]
        for repeat in range(jump_n_sample):
            if repeat:  # back from the section's end to its beginning, in one draw of q(x_t | x_s)
                alpha = section[0][2] / section[-1][3]
                x = math.sqrt(alpha) * x + math.sqrt(1 - alpha) * randn_like(x)
            for _, t, alpha_bar, alpha_bar_next in section:
                x_start = denoise(x, t)
                x = ddpm_step(x, x_start, alpha_bar, alpha_bar_next, diffusion.v_posterior, randn_like)
                if callback:
                    callback(calls, x, x_start)
                calls += 1
    return x


def invert_ddim(denoise, x, diffusion, timesteps=None, iterations: int = 3):
    """The x_T from which `sample_ddim` over the same timesteps leads to the image x (Song et al. 2020, section 4.3).

    A step of DDIM turns x_t by an angle against v, x_next = cos x_t - sin v(x_t) (Salimans & Ho 2022, appendix D). It is
    solved for x_t by fixed-point iteration, from v at x_next; each iteration calls the network once. One is to first order
    the usual inversion (Dhariwal & Nichol 2021, appendix F), which goes by eps and could not be iterated near zero SNR.

    Raises:
        ValueError: iterations is below 1, or a step leads from pure noise straight to data, which nothing undoes.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}: it must be at least 1")
    for _, t, alpha_bar, alpha_bar_next in reversed(noise_levels(diffusion, timesteps)):
        cos = math.sqrt(alpha_bar * alpha_bar_next) + math.sqrt((1 - alpha_bar) * (1 - alpha_bar_next))
        sin = math.sqrt((1 - alpha_bar) * alpha_bar_next) - math.sqrt(alpha_bar * (1 - alpha_bar_next))
        if cos == 0:
            raise ValueError("one step from pure noise to data cannot be inverted: use more timesteps")
        x_t = x  # x belongs to the level of alpha_bar_next
        for _ in range(iterations):
            v = (math.sqrt(alpha_bar) * x_t - denoise(x_t, t)) / math.sqrt(1 - alpha_bar)
            x_t = (x + sin * v) / cos
        x = x_t
    return x


def slerp(a, b, share: float):
    """Spherical interpolation between two numpy arrays of noise: a at share 0, b at 1, and between them noise of the same
    length, as a Gaussian's samples have it (Shoemake 1985; Song et al. 2020, appendix D.5)."""
    cosine = float((a * b).sum() / math.sqrt((a**2).sum() * (b**2).sum()))
    angle = math.acos(min(max(cosine, -1.0), 1.0))
    if angle < 1e-6 or math.pi - angle < 1e-6:  # parallel: the sphere gives no way between
        return (1 - share) * a + share * b
    return (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)
