"""Latent diffusion (Rombach et al. 2022): a frozen first stage between images and the latents that are diffused."""

import hashlib
import itertools
import os
from collections.abc import Callable
from functools import partial

import numpy as np

from mindspore import Tensor

from .files import cache_folder, in_batches, load_or_compute
from .images import to_float
from .models.autoencoder import Autoencoder
from .runtime import compiled

PIXELS = 100 * 32 * 32  # per batch of images; bounds the memory of encoding and decoding


class FirstStage:
    """A trained autoencoder, in evaluation mode for good, and the latent scale.

    The diffusion sees latents times `scale`, which gives them standard deviation 1 (Rombach et al. 2022, appendix G). For
    training it keeps what the encoder gives: moments (2 embed_dim, h, w), of which each step draws a latent, or of a VQModel
    the latent (embed_dim, h, w) itself, before quantization.

    Args:
        scale: factor of the latents.
        f: ratio of image size to latent size.
        patch: side in pixels of overlapping patches that are encoded and decoded one by one (`in_patches`), for images that
            need too much memory as a whole; None: whole images.
    """

    def __init__(self, autoencoder: Autoencoder, scale: float = 1.0, f: int = 1, patch: int | None = None):
        self.net, self.scale, self.f, self.patch = autoencoder.set_train(False), scale, f, patch
        self.channels = autoencoder.post_quant_conv.weight.shape[1]  # of a latent
        side = (patch or 0) // f  # of a patch of latents
        stride = max(side // 2, 1)
        self._encode = self._graph(autoencoder.encode, patch or 0, stride * f, 1 / f)
        self._decode = self._graph(autoencoder.decode, side, stride, f)
        self.has_codebook = autoencoder.quantize is not None
        if self.has_codebook:
            self._nearest, self._entries = compiled(autoencoder.quantize.nearest), compiled(autoencoder.quantize.entries)

    def _graph(self, fn: Callable, size: int, stride: int, factor: float) -> Callable[[np.ndarray], np.ndarray]:
        """fn of Tensors, compiled, for arrays: of the whole array, or of patches if `patch` is set."""
        graph = compiled(fn)

        def whole(x: np.ndarray) -> np.ndarray:
            return graph(Tensor(x)).asnumpy()

        return partial(in_patches, whole, size=size, stride=stride, factor=factor) if self.patch else whole

    def moments(self, images: np.ndarray) -> np.ndarray:
        """Images (N, H, W, C) uint8 -> the moments (N, 2 embed_dim, h, w) of their latents, or the latents (N, embed_dim, h,
        w), not scaled."""
        size = PIXELS // images[0, ..., 0].size
        return in_batches(lambda batch: [self._encode(to_float(batch))], images, size, "first stage")[0]

    def cached_moments(self, images: np.ndarray, folder: str | os.PathLike | None = None) -> np.ndarray:
        """`moments`, kept in a file in `folder` or in the user's cache; its name hashes images, patch and weights."""
        key = hashlib.sha256(f"{images.shape} {self.patch}".encode() + images.tobytes())
        for p in self.net.get_parameters():
            key.update(p.asnumpy().tobytes())
        height, width = (side // self.f for side in images.shape[1:3])
        shapes = {"moments": (len(images), self.net.quant_conv.weight.shape[0], height, width)}
        path = cache_folder(folder) / f"latents-{key.hexdigest()[:16]}.bin"
        return load_or_compute(path, key.hexdigest(), shapes, lambda: {"moments": self.moments(images)})["moments"]

    def quantize(self, z: Tensor) -> Tensor:
        """Scaled latents (B, embed_dim, h, w) -> the nearest entries of a VQModel's codebook, scaled."""
        return self.scale * self._entries(self._nearest(z / self.scale))

    def codebook_ids(self, z: np.ndarray) -> np.ndarray:
        """Scaled latents (N, embed_dim, h, w) -> ids (N, h, w) int32 of the nearest entries of a VQModel's codebook."""
        scale, size = np.float32(self.scale), PIXELS // (z[0, 0].size * self.f**2)
        return in_batches(lambda batch: [self._nearest(Tensor(batch)).asnumpy()], z / scale, size)[0]

    def decode_ids(self, ids: np.ndarray) -> np.ndarray:
        """Ids (N, h, w) into a VQModel's codebook -> images (N, C, H, W)."""
        entries = self._entries(Tensor(ids.astype(np.int32))).asnumpy()
        return self.decode(entries * np.float32(self.scale))

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Images (N, H, W, C) uint8 -> images (N, C, H, W), decoded from their latents, or the means of these."""
        means, size = self.moments(images)[:, : self.channels], PIXELS // images[0, ..., 0].size
        return in_batches(lambda batch: [self._decode(batch)], means, size)[0]

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Images (N, C, H, W) in [-1, 1] -> scaled latents (N, embed_dim, h, w), the means."""
        channels, size = self.net.post_quant_conv.weight.shape[1], PIXELS // x[0, 0].size
        return self.scale * in_batches(lambda batch: [self._encode(batch)], x, size)[0][:, :channels]

    def decode(self, z: np.ndarray) -> np.ndarray:
        """Scaled latents (N, embed_dim, h, w) -> images (N, C, H, W), mostly in [-1, 1]."""
        size = PIXELS // (z[0, 0].size * self.f**2)
        return in_batches(lambda batch: [self._decode(batch)], z / np.float32(self.scale), size)[0]


def in_patches(fn: Callable[[np.ndarray], np.ndarray], x: np.ndarray, size: int, stride: int, factor: float) -> np.ndarray:
    """fn over overlapping patches of x (B, C, H, W), blended into one array, for images that are too large for fn.

    The method is CompVis latent-diffusion's split_input. In the overlap each patch is weighted by the distance to its own
    border, so that no seam is visible.

    Args:
        fn: (n, C, size, size) -> (n, C', factor size, factor size).
        stride: distance of neighbouring patches, in 1..size; the last patches lie at the right and bottom border.
        factor: ratio of the output size to the input size of fn; factor times stride, size, H and W must be whole.

    Returns:
        (B, C', factor H, factor W).

    Raises:
        ValueError: x is smaller than a patch, the stride is not in 1..size, or a position is not whole.
    """
    height, width = x.shape[2:]
    if min(height, width) < size or not 1 <= stride <= size:
        raise ValueError(f"patches of {size}, {stride} apart, do not fit {height} x {width}: choose stride <= size <= both")
    positions = [sorted({*range(0, n - size, stride), n - size}) for n in (height, width)]
    whole = [size * factor, height * factor, width * factor, *(p * factor for axis in positions for p in axis)]
    if any(value != int(value) for value in whole):
        wrong = f"{size}, {stride}, {height} and {width} times {factor:g} are not whole"
        raise ValueError(f"{wrong}: choose multiples of {1 / factor:g}")
    side = int(size * factor)
    edge = np.minimum(np.arange(side), np.arange(side)[::-1]) + 1
    weight = np.minimum(edge[:, None], edge).astype(np.float32)
    total, norm = np.zeros(()), np.zeros((int(height * factor), int(width * factor)), np.float32)
    for top, left in itertools.product(*positions):
        patch = fn(x[:, :, top : top + size, left : left + size])
        if not total.shape:
            total = np.zeros((*patch.shape[:2], *norm.shape), np.float32)
        rows, columns = (slice(int(p * factor), int(p * factor) + side) for p in (top, left))
        total[:, :, rows, columns] += weight * patch
        norm[rows, columns] += weight
    return total / norm
