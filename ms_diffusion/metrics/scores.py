"""Scores of samples against real images, each beside its floor: what real images of the other split score.

reference = Reference(Features(), "fashion-mnist", None, size=28, channels=1, num=10_000)
record = reference.score(Samples(images, labels, "my model"))
print(format_report(record))
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.batches import Labelled, check_images, check_labels, load_images
from ..data.fashion_mnist import center_crop
from ..files import load_npz, write
from ..images import grid
from ..runtime import UserError
from . import distances
from .features import Features, Outputs

OTHER_SPLIT = {"train": "test", "test": "train"}
PICTURE_IMAGES = 30  # of each kind in the picture
NEAREST_SAMPLES = 500  # samples, at most, whose nearest training image is computed


@dataclass(frozen=True)
class Samples:
    """Images (N, H, W, C) uint8 to score, the class (N,) that each should show, or None, and how they were made."""

    images: np.ndarray
    labels: np.ndarray | None
    description: str


def read_npz(path: str | Path, num: int | None = None) -> Samples:
    """The first `num` images (N, H, W, C) of an .npz file's array `images`, and of its array `labels`, if there is one.
    Raises UserError if the file cannot be read, has no images, or an array has the wrong shape or type."""
    try:
        arrays = load_npz(path, ("images", "labels"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read as an .npz file: {e}") from e
    if "images" not in arrays:
        raise UserError(f"{path} has no array `images`: write it as the option --npz of the sample command does")
    images, labels = arrays["images"], arrays.get("labels")
    check_images(images, f"{path}: ")
    if labels is not None:
        check_labels(labels, len(images), f"{path}: ")
    return Samples(images[:num], None if labels is None else labels[:num], str(path))


def real_images(name: str, folder: str | None, size: int, channels: int, **options: Any) -> dict[str, Labelled]:
    """{"train", "test": (images, labels)} of a data set; where both are the same, as those of an image folder, halves."""
    splits = {split: load_images(name, folder, split, size, channels, **options) for split in OTHER_SPLIT}
    return halve(*splits["train"]) if np.array_equal(splits["train"][0], splits["test"][0]) else splits


def halve(images: np.ndarray, labels: np.ndarray) -> dict[str, Labelled]:
    """{"train", "test": (images, labels)}: two random halves, always the same ones."""
    order = np.random.default_rng(0).permutation(len(images))
    return {split: (images[order[i::2]], labels[order[i::2]]) for i, split in enumerate(OTHER_SPLIT)}


def choose(images: np.ndarray, labels: np.ndarray, num: int) -> Labelled:
    """`num` random images, always the same ones, with their labels; all of them if there are fewer."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(images))[:num])
    return images[chosen], labels[chosen]


class Reference:
    """Real images that samples are compared with. Everything that can be refused is refused here, before sampling: UserError
    if the features do not take such images, or there are too few for them.

    Args:
        features: the network whose features are compared.
        name: the data set, and the name of the images in the report.
        folder: the folder of the data set.
        size, channels: height and width, and number of channels, of the samples.
        num: the number of samples, and of the real images that give the floor.
        against: the split that samples are compared with; the other one gives the floor.
        against_num: the number of images of that split; None is `num`. Of a split with fewer images all are used.
        splits: the real images, if they are not in a data set (see `halve`).
        num_name: what an error calls `num`.
        options: what the data set's loader takes beside these.
    """

    def __init__(
        self,
        features: Features,
        name: str,
        folder: str | None,
        size: int,
        channels: int,
        num: int,
        against: str = "test",
        against_num: int | None = None,
        splits: dict[str, Labelled] | None = None,
        num_name: str = "--num",
        options: dict[str, Any] | None = None,
    ):
        self.features, self.name, self.folder, self.against = features, name, folder, against
        self.is_fashion_mnist = name.startswith("fashion-mnist")  # with a border to crop, and the classifier's classes
        features.check(self.crop(np.zeros((1, size, size, channels))).shape[1:])
        self.splits = splits or real_images(name, folder, size, channels, **(options or {}))
        against_num = against_num or num
        numbers = {num_name: num, "--against-num": against_num}
        numbers |= {f"{name}, {split}": len(images) for split, (images, _) in self.splits.items()}
        for what, n in numbers.items():
            try:
                distances.check_number(n, features.num)
            except ValueError as e:
                raise UserError(f"{what}: {e}") from e
        self.chosen = {s: choose(*self.splits[s], against_num if s == against else num) for s in OTHER_SPLIT}

    def crop(self, images: np.ndarray) -> np.ndarray:
        return center_crop(images) if self.is_fashion_mnist else images

    def real_samples(self, split: str) -> Samples:
        """The chosen images of a split, as samples."""
        return Samples(*self.chosen[split], f"real {split} images")

    def score(self, samples: Samples, originals: np.ndarray | None = None) -> dict:
        """{"protocol": how the scores were made, "samples", "floor": scores by name}, all of it ready for JSON.

        If the samples are reconstructions of `originals` (N, H, W, C) uint8, PSNR and SSIM are among the scores.
        """
        features, against, other = self.features, self.against, OTHER_SPLIT[self.against]
        real = {split: features.cached(self.crop(images), self.folder) for split, (images, _) in self.chosen.items()}
        split = next((s for s, (images, _) in self.chosen.items() if images is samples.images), None)
        found = real[split] if split else features(self.crop(samples.images))
        if not self.is_fashion_mnist:  # the classifier knows the classes of no other data set
            for outputs in (*real.values(), found):
                outputs.pop("logits", None)
        scores = score(found, real[against], samples.labels)
        floor = score(real[other], real[against], self.chosen[other][1])
        if originals is not None:
            pair = self.crop(samples.images), self.crop(originals)
            scores |= {"psnr": float(distances.psnr(*pair).mean()), "ssim": float(distances.ssim(*pair).mean())}
        for table, images in ((scores, samples.images), (floor, self.chosen["test"][0])):  # the floor: always test images
            table["nearest_train"] = float(nearest(images[:NEAREST_SAMPLES], self.splits["train"][0])[1].mean())
        protocol = (
            f"{features.name}, {features.num} features; {samples.description}; N = {len(samples.images)} against "
            f"{len(self.chosen[against][0])} {against} images of {self.name}; "
            f"floor: {len(self.chosen[other][0])} real {other} images"
        )
        return {"protocol": protocol, "samples": scores, "floor": floor}

    def save_picture(self, path: str | Path, samples: Samples) -> None:
        """Write a PNG of real images, samples, and samples above their nearest training images."""
        from matplotlib.figure import Figure  # takes a second to import

        first, (train, _) = samples.images[:10], self.splits["train"]
        panels = {
            "real": self.chosen[self.against][0][:PICTURE_IMAGES],
            "samples": samples.images[:PICTURE_IMAGES],
            "samples, and below each its nearest training image": np.concatenate([first, train[nearest(first, train)[0]]]),
        }
        figure = Figure(figsize=(7, 6.6), layout="constrained")
        for axes, (title, images) in zip(figure.subplots(len(panels), 1), panels.items(), strict=True):
            sheet = grid(images, 10)
            axes.imshow(sheet.squeeze(-1) if sheet.shape[-1] == 1 else sheet, cmap="gray", vmin=0, vmax=255)
            axes.set(title=title, xticks=[], yticks=[])
        write(path, lambda f: figure.savefig(f, format="png", dpi=110))


def score(found: Outputs, reference: Outputs, labels: np.ndarray | None = None) -> dict[str, float]:
    """All scores of samples by their features (N, d) and logits (N, classes), against those of the reference images."""
    a, b = found["features"], reference["features"]
    fid = distances.frechet_distance(*distances.mean_and_covariance(a), *distances.mean_and_covariance(b))
    kid, spread = distances.kernel_distance(a, b, np.random.default_rng(0), size=min(1000, len(a) // 2, len(b) // 2))
    scores = {"fid": fid, "kid": kid, "kid_spread": spread, **distances.precision_recall(a, b)}
    if "logits" in found:
        classes, reference_classes = found["logits"].argmax(1), reference["logits"].argmax(1)
        p, q = (np.bincount(c, minlength=found["logits"].shape[1]) / len(c) for c in (classes, reference_classes))
        if labels is not None:
            scores["class_accuracy"] = float((classes == labels).mean())
        scores["class_balance"] = float(1 - np.abs(p - q).sum() / 2)
    return scores


def nearest(images: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of N images the index of the nearest training image, and the root mean square difference of their pixels
    (0..255): (N,), (N,)."""
    x, data = (np.asarray(each, np.float32).reshape(len(each), -1) for each in (images, train))
    blocks = [(square.argmin(1), square.min(1)) for square in distances.squared_distance_blocks(x, data, 100)]
    index, square = (np.concatenate(column) for column in zip(*blocks, strict=True))
    return index, np.sqrt(square / x.shape[1])


ROWS = {  # name -> title and format in the report
    "fid": ("FID", "{:.4f}"),
    "kid": ("KID", "{:.5f}"),
    "kid_spread": ("  its spread over subsets", "{:.5f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "density": ("density", "{:.3f}"),
    "coverage": ("coverage", "{:.3f}"),
    "class_accuracy": ("class accuracy", "{:.2%}"),
    "class_balance": ("class balance", "{:.3f}"),
    "psnr": ("PSNR of reconstructions (dB)", "{:.2f}"),
    "ssim": ("SSIM of reconstructions", "{:.4f}"),
    "nearest_train": ("nearest training image (RMS of 0..255)", "{:.1f}"),
}


def format_report(record: dict) -> str:
    """A table of the scores, one a row, beside their floors; the last line is the protocol."""
    lines = [f"{'':40} {'samples':>10} {'floor':>10}"]
    for name, (title, form) in ROWS.items():
        columns = [form.format(scores[name]) if name in scores else "-" for scores in (record["samples"], record["floor"])]
        if columns != ["-", "-"]:
            lines.append("{:40} {:>10} {:>10}".format(title, *columns))
    return "\n".join([*lines, record["protocol"]])
