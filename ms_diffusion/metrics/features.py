"""Images as numbers that a Frechet distance can compare: the features of a small classifier, or of InceptionV3."""

import contextlib
import hashlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mindspore import Tensor

from ..files import write
from ..images import to_float
from ..models.classifier import BUNDLED, Classifier, load_classifier
from ..models.inception import InceptionV3, load_inception
from ..files import cache_folder
from ..runtime import UserError, compiled

BATCH = 250  # images at once


class Features:
    """`features(images)`: what the classifier that comes with the package sees in 28 x 28 gray images, {"features": (N,
    128), "logits": (N, 10)}; or InceptionV3, given the file of its weights, in any, {"features": (N, 2048)}. float32.

    With `bar` a progress bar is shown.

    Raises:
        UserError: the weights cannot be read; when called, the images are not such.
    """

    def __init__(self, inception: str | None = None, bar: bool = False):
        self.name = "InceptionV3 pool3" if inception else "classifier"
        self.net = load_inception(inception) if inception else load_classifier()
        self.num = InceptionV3.features if inception else Classifier.num_features
        self.weights = Path(inception or BUNDLED).read_bytes()
        names = ("features",) if inception else ("features", "logits")
        self.bar = bar
        self.names, self.graph = names, compiled(self.net if inception else self.net.features_and_logits)

    def check(self, shape) -> None:
        """Refuse images of another shape (H, W, C) than the network takes."""
        if "logits" in self.names and tuple(shape) != (28, 28, 1):
            raise UserError(
                "the classifier takes gray images of 28 x 28, not {} x {} x {}: give --inception WEIGHTS".format(*shape)
            )

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Of images (N, H, W, C) uint8."""
        self.check(images.shape[1:])
        size, found = min(BATCH, len(images)), []
        for first in tqdm(range(0, len(images), size), unit="batch", desc=self.name, disable=not self.bar):
            rows = np.minimum(np.arange(first, first + size), len(images) - 1)  # the last batch is filled up
            out = self.graph(Tensor(to_float(images[rows])))
            found.append([values.asnumpy() for values in (out if isinstance(out, tuple) else (out,))])
        columns = zip(*found, strict=True)
        return {name: np.concatenate(column)[: len(images)] for name, column in zip(self.names, columns, strict=True)}

    def cached(self, images: np.ndarray, folder: str | None = None) -> dict[str, np.ndarray]:
        """The same, kept in a file beside the data, in `folder`, or else in the user's cache. Its name is a hash of the
        images and of the weights, so what was made of others is never taken for them."""
        made = hashlib.sha256(self.weights + str(images.shape).encode() + images.tobytes()).hexdigest()
        path = cache_folder(folder) / f"features-{made[:16]}.npz"
        try:
            with open(path, "rb") as file, np.load(file) as kept:
                return {name: kept[name] for name in self.names}
        except Exception:  # none yet, or a spoilt one, which raises a dozen kinds
            found = self(images)
        with contextlib.suppress(OSError):  # a full or read-only disk costs time alone
            write(path, lambda f: np.savez(f, **found))
        return found
