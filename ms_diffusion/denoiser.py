"""From a network to what the samplers use, denoise(x_t, t) -> x_0, and what composes around it.

A denoiser takes x_t (B, ...) float32 and one timestep t for all; conditions, (B, ...) each, follow t in the network's order.
"""

import numpy as np

from mindspore import Tensor, ops

from .process import GaussianDiffusion, as_tuple, predict
from .runtime import compiled


def make_denoiser(diffusion: GaussianDiffusion, net, cond=None, clip: bool = True):
    """`denoise(x_t, t, *cond)`: the x_0 that the network sees in x_t, compiled.

    `cond`, a Tensor or a tuple, stands in where the call gives none; `clip` keeps x_0 in [-1, 1], where images live.
    """
    net.set_train(False)

    def predict_start(x_t, t, *cond):
        x_start = diffusion.predict_start(predict(net, x_t, t, cond), x_t, t)
        return ops.clamp(x_start, -1.0, 1.0) if clip else x_start

    graph = compiled(predict_start)
    default = as_tuple(cond)

    def denoise(x_t, t: int, *cond):
        return graph(x_t, Tensor(np.full(x_t.shape[0], t, np.int32)), *(cond or default))

    return denoise


def with_label(denoise, label: int):
    """The denoiser with this class label in the place of all labels; `num_classes` is the label for none."""

    def relabelled(x_t, t, labels, *cond):
        return denoise(x_t, t, Tensor(np.full(labels.shape, label, np.int32)), *cond)

    return relabelled


def guide(denoise, denoise_uncond, scale: float, rescale: float = 0.0, interval=None, clip: bool = True):
    """Classifier-free guidance (Ho & Salimans 2021, eq. 6, scale = 1 + w) in x_0: uncond + scale (cond - uncond). Scale 0
    is the unconditional denoiser, 1 the conditional; both must be unclipped, for their difference is amplified.

    Args:
        rescale: share of the result that is brought back to the conditional x_0's standard deviation, which guidance raises
            (Lin et al. 2024, eqs. 14 to 16).
        interval: (first, last) timestep of those that are guided; elsewhere the conditional denoiser runs alone
            (Kynkaanniemi et al. 2024, eq. 5).
        clip: keep x_0 in [-1, 1].
    """

    def guided(x_t, t: int, *cond):
        x_start = denoise(x_t, t, *cond)
        if scale != 1 and (interval is None or interval[0] <= t <= interval[1]):
            uncond = denoise_uncond(x_t, t, *cond)
            std = _std(x_start)
            x_start = uncond + scale * (x_start - uncond)
            if rescale:
                x_start = (rescale * std / _std(x_start) + (1 - rescale)) * x_start
        return x_start.clip(-1.0, 1.0) if clip else x_start

    return guided


def _std(x):
    """Standard deviation of each sample, (B, 1, ...)."""
    flat = x.reshape(x.shape[0], -1)
    centred = flat - flat.mean(1).reshape(-1, 1)
    return ((centred**2).mean(1) ** 0.5).reshape((-1,) + (1,) * (x.ndim - 1))


def inpaint(denoise, known, mask):
    """The x_0 of `known` (B, ...) wherever `mask` is 1, the denoiser's where it is 0.

    The sampler then noises the known part as it goes: the replacement method of Song et al. 2021 (appendix I.2), and with
    `sample_repaint` RePaint.
    """

    def inpainted(x_t, t: int, *cond):
        return mask * known + (1 - mask) * denoise(x_t, t, *cond)

    return inpainted


def with_self_conditioning(denoise):
    """Self-conditioning (Chen et al. 2022, "Analog bits", algorithm 2): the network also gets the x_0 of the call before.

    Make a new one for each sample: the first call sees zeros.
    """
    last = None

    def conditioned(x_t, t: int, *cond):
        nonlocal last
        last = denoise(x_t, t, *cond, x_t * 0 if last is None else last)
        return last

    return conditioned


def self_conditioned(sampler):
    """The sampler over `with_self_conditioning(denoise)`, with a new memory for each call of it."""

    def sample(denoise, *args, **options):
        return sampler(with_self_conditioning(denoise), *args, **options)

    return sample
