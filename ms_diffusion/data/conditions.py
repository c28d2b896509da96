"""Images that a network is conditioned on: x_0 without detail, without colour, or without a part of it."""

from collections.abc import Callable, Sequence

import numpy as np

from ..randomness import Random, draw_rows

KINDS = ("none", "lowres", "gray", "mask")


def condition_channels(kind: str, channels: int, latent_channels: int | None = None) -> int:
    """The number of channels of `condition_image` for an image with `channels` channels, or of `latent_condition` for
    latents with `latent_channels` channels."""
    gray, seen = (1, channels) if latent_channels is None else (latent_channels, latent_channels)
    return {"none": 0, "lowres": channels, "gray": gray, "mask": seen + 1}[kind]


def condition_image(kind: str, x: np.ndarray, lowres_size: int, rng: Random) -> np.ndarray:
    """x (B, C, H, W) float32 in [-1, 1] -> (B, condition_channels, H, W) float32.

    lowres: means over lowres_size x lowres_size blocks, repeated to the size of x (super-resolution, Saharia et al. 2021).
    gray: the mean over the channels (colourisation). mask: x with a random rectangle set to 0, whose sides are a quarter to
    three quarters of the image's, and a channel that is 1 in the rectangle and -1 elsewhere (inpainting). Both are from
    Saharia et al. 2022, "Palette".
    """
    b, c, height, width = x.shape
    if kind == "lowres":
        h, w = height // lowres_size, width // lowres_size
        return x.reshape(b, c, lowres_size, h, lowres_size, w).mean((3, 5)).repeat(h, 2).repeat(w, 3)
    if kind == "gray":
        return x.mean(1, keepdims=True)
    hidden = draw_rows(rng, b, lambda rng, n: random_rectangles(rng, n, height, width))
    return masked(x, hidden)


def masked(x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """x (B, C, H, W) with 0 where hidden (B, 1, H, W) is 1, and hidden, as a last channel."""
    return np.concatenate([np.where(hidden > 0, np.float32(0), x), hidden], 1)


def latent_condition(
    kind: str, cond: np.ndarray, size: Sequence[int], channels: int, encode: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """A `condition_image` (B, k, H, W) of images with `channels` channels, for latents of this size: (B, k', h, w).

    lowres: reduced to the size of the latents, in whose cells it must be constant. gray, mask: the image is encoded by
    `encode`, (B, channels, H, W) -> (B, latent channels, h, w), and a cell is hidden where any of its pixels is. These are
    the conditions of latent diffusion (Rombach et al. 2022, sections 4.4 and 4.5)."""
    if kind == "lowres":
        return reduced(cond, size, np.max)
    image, hidden = cond[:, :channels], cond[:, channels:]
    z = encode(np.broadcast_to(image, (len(image), channels, *image.shape[2:])))  # of gray, in each channel
    return np.concatenate([z, reduced(hidden, size, np.max)], 1) if hidden.shape[1] else z


def reduced(x: np.ndarray, size: Sequence[int], reduction: Callable[..., np.ndarray]) -> np.ndarray:
    """x (B, C, H, W) -> (B, C, h, w) for size (h, w): reduction(block, axes) of each block of H/h x W/w pixels."""
    (h, w), (height, width) = size, x.shape[2:]
    return reduction(x.reshape(*x.shape[:2], h, height // h, w, width // w), (3, 5))


def random_rectangles(rng: np.random.Generator, n: int, height: int, width: int) -> np.ndarray:
    """(n, 1, height, width) float32: 1 in a rectangle, -1 elsewhere."""
    hidden = np.full((n, 1, height, width), -1, np.float32)
    for image in hidden:
        h, w = rng.integers(height // 4, height * 3 // 4 + 1), rng.integers(width // 4, width * 3 // 4 + 1)
        top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        image[:, top : top + h, left : left + w] = 1
    return hidden
