"""Images that a network is shown beside x: what is left of x_0 when detail, colour or a part of it is taken away."""

import numpy as np

KINDS = ("none", "lowres", "gray", "mask")


def condition_channels(kind: str, channels: int) -> int:
    """Channels of the condition that `condition_image` makes of an image with so many."""
    return {"none": 0, "lowres": channels, "gray": 1, "mask": channels + 1}[kind]


def condition_image(kind: str, x: np.ndarray, lowres_size: int, rng: np.random.Generator) -> np.ndarray:
    """x (B, C, H, W) float32 in [-1, 1] -> (B, condition_channels, H, W) float32.

    lowres: means over blocks, lowres_size of them a side, as large as x again (super-resolution, Saharia et al. 2021).
    gray: the mean over the channels (colourisation). mask: x with a random rectangle set to 0, a quarter to three quarters a
    side, and a channel that is 1 where x is hidden, -1 elsewhere (inpainting; both: Saharia et al. 2022, "Palette").
    """
    b, c, height, width = x.shape
    if kind == "lowres":
        block = (height // lowres_size, width // lowres_size)
        small = x.reshape(b, c, lowres_size, block[0], lowres_size, block[1]).mean((3, 5))
        return small.repeat(block[0], 2).repeat(block[1], 3)
    if kind == "gray":
        return x.mean(1, keepdims=True)
    hidden = np.full((b, 1, height, width), -1, np.float32)
    for i in range(b):
        h, w = rng.integers(height // 4, height * 3 // 4 + 1), rng.integers(width // 4, width * 3 // 4 + 1)
        top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        hidden[i, :, top : top + h, left : left + w] = 1
    return np.concatenate([np.where(hidden > 0, np.float32(0), x), hidden], 1)
