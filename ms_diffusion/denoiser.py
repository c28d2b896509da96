"""From a network to what the samplers use: denoise(x_t, t) -> x_0."""

import numpy as np

from mindspore import Tensor, ops

from .diffusion import GaussianDiffusion, predict
from .runtime import compiled


def make_denoiser(diffusion: GaussianDiffusion, net, cond=None, clip: bool = True):
    """`denoise(x_t, t)`: x_t (B, ...) float32 and one timestep t -> the x_0 that the network sees, compiled.

    `cond` (B, ...) is handed to the network; `clip` keeps x_0 in [-1, 1], where images live.
    """
    net.set_train(False)

    def predict_start(x_t, t):
        x_start = diffusion.predict_start(predict(net, x_t, t, cond), x_t, t)
        return ops.clamp(x_start, -1.0, 1.0) if clip else x_start

    graph = compiled(predict_start)

    def denoise(x_t, t: int):
        return graph(x_t, Tensor(np.full(x_t.shape[0], t, np.int32)))

    return denoise
