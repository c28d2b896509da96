"""Latent diffusion (Rombach et al. 2022): a frozen first stage between images and the latents that are diffused."""

import contextlib
import hashlib
import itertools

import numpy as np
from tqdm import tqdm

from mindspore import Tensor

from .files import cache_folder, write
from .images import to_float
from .models.autoencoder import AutoencoderKL
from .runtime import compiled

PIXELS = 100 * 32 * 32  # of a batch of images, which bounds the memory that encoding and decoding take


class FirstStage:
    """A trained autoencoder, frozen, and the latent scale: the diffusion sees latents times `scale`, which makes their
    standard deviation 1 (Rombach et al. 2022, appendix G).

    Args:
        scale: what latents are multiplied by.
        f: by how much a latent's H and W are smaller than an image's.
        patch: side of overlapping patches of an image, in pixels, that are encoded and decoded one by one, for images whose
            whole takes too much memory (`in_patches`); None is whole images.
    """

    def __init__(self, autoencoder: AutoencoderKL, scale: float = 1.0, f: int = 1, patch: int | None = None):
        self.net, self.scale, self.f, self.patch = autoencoder.set_train(False), scale, f, patch
        encode, decode = compiled(autoencoder.encode), compiled(autoencoder.decode)
        self._encode, self._decode = lambda x: encode(Tensor(x)).asnumpy(), lambda z: decode(Tensor(z)).asnumpy()
        if patch:
            side = patch // f  # of a patch of latents
            whole_encode, whole_decode, apart = self._encode, self._decode, max(side // 2, 1)
            self._encode = lambda x: in_patches(whole_encode, x, patch, apart * f, 1 / f)
            self._decode = lambda z: in_patches(whole_decode, z, side, apart, f)

    def moments(self, images: np.ndarray) -> np.ndarray:
        """Of images (N, H, W, C) uint8, the moments (N, 2 embed_dim, h, w) of their latents, unscaled."""
        return batched(lambda chosen: self._encode(to_float(chosen)), images, images[0, ..., 0].size, "first stage")

    def cached_moments(self, images: np.ndarray, folder: str | None = None) -> np.ndarray:
        """The same, kept in a file beside the data, in `folder`, or else in the user's cache. Its name is a hash of the
        images, of their patches and of the weights."""
        made = hashlib.sha256(f"{images.shape} {self.patch}".encode() + images.tobytes())
        for p in self.net.get_parameters():
            made.update(p.asnumpy().tobytes())
        path = cache_folder(folder) / f"latents-{made.hexdigest()[:16]}.npy"
        try:
            return np.load(path)
        except Exception:  # none yet, or a spoilt one, which raises a dozen kinds
            found = self.moments(images)
        with contextlib.suppress(OSError):  # a full or read-only disk costs time alone
            write(path, lambda f: np.save(f, found))
        return found

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """What comes back of images (N, H, W, C) uint8 by way of their likeliest latents: (N, C, H, W)."""
        moments = self.moments(images)
        return batched(self._decode, moments[:, : moments.shape[1] // 2], images[0, ..., 0].size)

    def decode(self, z: np.ndarray) -> np.ndarray:
        """Scaled latents (N, embed_dim, h, w) -> images (N, C, H, W), mostly in [-1, 1]."""
        return batched(self._decode, z / np.float32(self.scale), z[0, 0].size * self.f**2)


def batched(fn, rows: np.ndarray, pixels: int, name: str | None = None) -> np.ndarray:
    """fn(rows), of images with so many pixels, in batches of one size, so that it is compiled once; a bar with this `name`
    shows how far it is."""
    size, found = max(min(PIXELS // pixels, len(rows)), 1), []
    for first in tqdm(range(0, len(rows), size), unit="batch", desc=name, disable=name is None):
        chosen = rows[np.minimum(np.arange(first, first + size), len(rows) - 1)]  # the last batch is filled up
        found.append(fn(chosen))
    return np.concatenate(found)[: len(rows)]


def in_patches(fn, x: np.ndarray, size: int, stride: int, factor: float) -> np.ndarray:
    """fn over overlapping patches of x (B, C, H, W), laid over each other again: for an image that is larger than fn takes
    (CompVis latent-diffusion's split_input).

    Where patches meet, each counts by its distance to its own border, so that no seam shows.

    Args:
        fn: (n, C, size, size) -> (n, C', factor size, factor size).
        stride: from one patch to the next, at most `size`; the last ones lie at the right and bottom border.
        factor: how much larger, or smaller, fn makes a patch; factor times stride, size, H and W must be whole.

    Returns:
        (B, C', factor H, factor W).

    Raises:
        ValueError: x is smaller than a patch, the stride is not in 1..size, or a place is not whole.
    """
    height, width = x.shape[2:]
    if min(height, width) < size or not 1 <= stride <= size:
        raise ValueError(f"patches of {size}, {stride} apart, do not fit {height} x {width}: choose stride <= size <= both")
    places = [sorted({*range(0, n - size, stride), n - size}) for n in (height, width)]
    whole = [size * factor, height * factor, width * factor, *(p * factor for axis in places for p in axis)]
    if any(value != int(value) for value in whole):
        raise ValueError(
            f"{size}, {stride}, {height} and {width} times {factor:g} are not whole: choose multiples of {1 / factor:g}"
        )
    side = int(size * factor)
    edge = np.minimum(np.arange(side), np.arange(side)[::-1]) + 1
    weight = np.minimum(edge[:, None], edge).astype(np.float32)
    total, norm = None, np.zeros((int(height * factor), int(width * factor)), np.float32)
    for top, left in itertools.product(*places):
        patch = fn(x[:, :, top : top + size, left : left + size])
        if total is None:
            total = np.zeros((*patch.shape[:2], *norm.shape), np.float32)
        y, x_ = int(top * factor), int(left * factor)
        total[:, :, y : y + side, x_ : x_ + side] += weight * patch
        norm[y : y + side, x_ : x_ + side] += weight
    return total / norm
