"""Denoisers: from a network to `denoise(x_t, t, *cond) -> x_0`, which the samplers call, and wrappers around it.

A denoiser takes x_t (B, ...) float32, one timestep t for the whole batch, and the network's conditions (B, ...) in order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any

import numpy as np

from mindspore import Tensor, nn, ops

from .process import Cond, Process, as_tuple, predict
from .runtime import compiled, on_device

Array = Any  # a mindspore.Tensor or a numpy array: the wrappers below work on both
Denoiser = Callable[..., Array]


@contextmanager
def evaluation_mode(net: nn.Cell) -> Iterator[None]:
    """Switch all cells of `net` to evaluation mode within the block, then restore the flag of each cell."""
    training = [cell for _, cell in net.cells_and_names() if cell.training]
    for cell in training:
        cell.add_flags(training=False)
    try:
        yield
    finally:
        for cell in training:
            cell.add_flags(training=True)


def exact_denoiser(data: np.ndarray, diffusion: Process) -> Denoiser:
    """`denoise(x_t, t) -> E[x_0 | x_t]` for data (n, d), each as probable as the other: the denoiser that a network of these
    data alone would learn if it could (Karras et al. 2022, eq. 57). numpy arrays, x_t (B, d)."""
    data = np.asarray(data, np.float64)

    def denoise(x_t: np.ndarray, t: int) -> np.ndarray:
        alpha, sigma = diffusion.level(t)
        mean = alpha * data
        squares = (x_t**2).sum(1)[:, None] - 2 * x_t @ mean.T + (mean**2).sum(1)
        weights = np.exp((squares.min(1, keepdims=True) - squares) / (2 * sigma**2))
        return weights @ data / weights.sum(1, keepdims=True)

    return denoise


def make_denoiser(diffusion: Process, net: nn.Cell, cond: Cond = None, clip: bool | None = None) -> Denoiser:
    """Compile `denoise(x_t, t, *cond) -> x_0` (B, ...), the network's prediction in evaluation mode.

    Args:
        cond: the conditions for calls that pass none.
        clip: clip x_0 to [-1, 1], the range of images; None is `diffusion.clip_denoised`."""
    clip, default = diffusion.clip_denoised if clip is None else clip, as_tuple(cond)

    def predict_start(x_t: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        x_start = diffusion.predict_start(predict(net, x_t, t, cond), x_t, t)
        return ops.clamp(x_start, -1.0, 1.0) if clip else x_start

    graph, times, gather = compiled(predict_start), lru_cache(4096)(filled), ops.Gather()

    @lru_cache(64)
    def filled_up(n: int) -> Tensor:
        """The rows of a batch of n, and its last one again up to the size that is compiled."""
        return on_device(np.minimum(np.arange(graph_size(n)), n - 1).astype(np.int32))

    def denoise(x_t: Tensor, t: int, *cond: Tensor) -> Tensor:
        n, values = x_t.shape[0], (x_t, *(cond or default))
        if size_differs := graph_size(n) != n:
            values = [gather(value, filled_up(n), 0) for value in values]
        with evaluation_mode(net):
            x_start = graph(values[0], times(t, values[0].shape[:1]), *values[1:])
        return x_start[:n] if size_differs else x_start

    return denoise


def graph_size(n: int) -> int:
    """The batch size of the graph that is used for n samples: the next of 1, 2, 3, 4, 6, 8, 12, 16, ..., 64, or n above it.
    A graph for each n would cost seconds, and megabytes that MindSpore never frees."""
    power = 1 << (n - 1).bit_length()
    return n if n > 64 else power * 3 // 4 if n <= power * 3 // 4 else power


def filled(value: int, shape: tuple[int, ...]) -> Tensor:
    """An int32 Tensor of this shape and value, on the device."""
    return on_device(np.full(shape, value, np.int32))


def with_label(denoise: Denoiser, label: Any) -> Denoiser:
    """The denoiser with `label` in place of each sample's first condition: a class, of which `num_classes` stands for none,
    or a row of another condition, such as tokens (L,) or a context (L, dim)."""
    row = np.asarray(label)
    row = row.astype(np.float32 if row.dtype.kind == "f" else np.int32)
    same = lru_cache(4)(lambda shape: on_device(np.ascontiguousarray(np.broadcast_to(row, shape))))
    return lambda x_t, t, labels, *cond: denoise(x_t, t, same(tuple(labels.shape)), *cond)


def guide(denoise: Denoiser, denoise_uncond: Denoiser, scale: float, rescale: float = 0.0,
        interval: tuple[int, int] | None = None, clip: bool = True) -> Denoiser:  # fmt: skip
    """Classifier-free guidance (Ho & Salimans 2021, eq. 6, scale = 1 + w) in x_0: uncond + scale (cond - uncond).

    Scale 0 is the unconditional denoiser and scale 1 the conditional one. Guidance amplifies the difference between both,
    so both must be unclipped.

    Args:
        rescale: share of the result that is rescaled to the standard deviation of the conditional x_0, because guidance
            raises it (Lin et al. 2024, eqs. 14 to 16).
        interval: first and last guided timestep; at other timesteps only the conditional denoiser runs (Kynkaanniemi et al.
            2024, eq. 5).
        clip: clip x_0 to [-1, 1]."""

    def guided(x_t: Array, t: int, *cond: Array) -> Array:
        x_start = denoise(x_t, t, *cond)
        if scale != 1 and (interval is None or interval[0] <= t <= interval[1]):
            uncond, plain = denoise_uncond(x_t, t, *cond), x_start
            x_start = uncond + scale * (x_start - uncond)
            if rescale:
                x_start = (rescale * _std(plain) / _std(x_start) + (1 - rescale)) * x_start
        return x_start.clip(-1.0, 1.0) if clip else x_start

    return guided


def _std(x: Array) -> Array:
    """Standard deviation of each sample, (B, 1, ...)."""
    centred = (flat := x.reshape(x.shape[0], -1)) - _mean(flat)
    return (_mean(centred * centred) ** 0.5).reshape((-1,) + (1,) * (x.ndim - 1))


def _mean(flat: Array) -> Array:
    """(B, n) -> (B, 1). Each call of Tensor.mean, or Tensor.sum, would leak 1 to 2 kB (MindSpore 2.10 on the CPU)."""
    total = ops.ReduceSum(keep_dims=True)(flat, 1) if isinstance(flat, Tensor) else flat.sum(1, keepdims=True)
    return total / flat.shape[1]


def inpaint(denoise: Denoiser, known: Array, mask: Array) -> Denoiser:
    """The x_0 of `known` (B, ...) where `mask` is 1, and the denoiser's x_0 where it is 0.

    The sampler then adds noise to the known part at each step. This is the replacement method (Song et al. 2021, appendix
    I.2), or RePaint with `sample_repaint`."""
    return lambda x_t, t, *cond: mask * known + (1 - mask) * denoise(x_t, t, *cond)


def with_self_conditioning(denoise: Denoiser) -> Denoiser:
    """Self-conditioning (Chen et al. 2022, "Analog bits", algorithm 2): each call also passes the x_0 of the previous call.

    The first call passes zeros, so each sampling run needs a new wrapper: see `self_conditioned`."""
    last = None

    def conditioned(x_t: Array, t: int, *cond: Array) -> Array:
        nonlocal last
        last = denoise(x_t, t, *cond, x_t * 0 if last is None else last)
        return last

    return conditioned


def self_conditioned(sampler: Callable[..., Array]) -> Callable[..., Array]:
    """The sampler with self-conditioning, which starts from zeros in each run."""

    @wraps(sampler)
    def sample(denoise: Denoiser, *args: Any, **options: Any) -> Array:
        return sampler(with_self_conditioning(denoise), *args, **options)

    return sample
