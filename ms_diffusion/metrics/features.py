"""Features of images, the points that a Frechet distance compares: from a small classifier, or from InceptionV3."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mindspore import Tensor

from ..files import cache_folder, in_batches, load_or_compute
from ..images import to_float
from ..models.classifier import BUNDLED, Classifier, load_classifier
from ..models.inception import InceptionV3, load_inception
from ..runtime import UserError, compiled

BATCH = 250  # images at once
Outputs = dict[str, np.ndarray]  # "features" (N, d), and "logits" (N, classes) of the classifier


class Features:
    """features(images (N, H, W, C) uint8) -> {"features": (N, 128), "logits": (N, 10)} float32 of the bundled classifier,
    for gray images of 28 x 28; or {"features": (N, 2048)} of InceptionV3, for images of any size.

    `inception` is the file with InceptionV3's weights, None the classifier; `bar` shows a progress bar. Raises UserError if
    the weights cannot be read; in a call, if the network does not take images of this shape.
    """

    def __init__(self, inception: str | None = None, bar: bool = False):
        self.name = "InceptionV3 pool3" if inception else "classifier"
        self.net = load_inception(inception) if inception else load_classifier()
        self.num = InceptionV3.features if inception else Classifier.num_features
        self.weights = Path(inception or BUNDLED).read_bytes()
        self.bar = bar
        self.names = ("features",) if inception else ("features", "logits")
        self.graph: Callable = compiled(self.net if inception else self.net.features_and_logits)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise a UserError if the network does not take images of this shape (H, W, C)."""
        if "logits" in self.names and tuple(shape) != (28, 28, 1):
            kind = " x ".join(map(str, shape))
            raise UserError(f"the classifier takes gray images of 28 x 28, not {kind}: give --inception WEIGHTS")

    def __call__(self, images: np.ndarray) -> Outputs:
        self.check(images.shape[1:])
        outputs = in_batches(self._forward, images, BATCH, self.name if self.bar else None)
        return dict(zip(self.names, outputs, strict=True))

    def _forward(self, images: np.ndarray) -> list[np.ndarray]:
        outputs = self.graph(Tensor(to_float(images)))
        return [output.asnumpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]

    def cached(self, images: np.ndarray, folder: str | None = None) -> Outputs:
        """The same, from a cache file in `folder` or in the user's cache (`cache_folder`), which the first call writes. Its
        name is a hash of the images and of the weights."""
        key = hashlib.sha256(self.weights + str(images.shape).encode() + images.tobytes()).hexdigest()
        widths = {"features": self.num, "logits": 10}
        shapes = {name: (len(images), widths[name]) for name in self.names}
        return load_or_compute(cache_folder(folder) / f"features-{key[:16]}.bin", key, shapes, lambda: self(images))
