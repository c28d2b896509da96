"""From arrays in memory to training batches: exactly repeatable, and resumable at any step at no cost."""

import numpy as np

from ..images import to_float
from ..randomness import Stream
from ..runtime import UserError
from .fashion_mnist import load_fashion_mnist, load_fashion_mnist_mini
from .image_folder import load_image_folder


class Batches:
    """Item i is the batch of training step ``start_step + i``, or of ``steps_per_call`` steps; see ``make_dataset``."""

    def __init__(self, images, labels, batch_size, steps, start_step, seed, flip, rank, world_size, steps_per_call):
        self.images, self.labels = images, labels
        self.batch_size, self.steps, self.start_step = batch_size, steps, start_step
        self.seed, self.flip, self.rank, self.world_size = seed, flip, rank, world_size
        self.steps_per_call = steps_per_call
        self.batches_per_epoch = len(images) // (batch_size * world_size)
        self.epoch, self.order = None, None  # the permutation of the epoch at hand

    def __len__(self):
        return (self.steps - self.start_step) // self.steps_per_call

    def __getitem__(self, i):
        step = self.start_step + int(i) * self.steps_per_call
        if self.steps_per_call == 1:
            return self.batch(step)
        batches = [self.batch(step + k) for k in range(self.steps_per_call)]
        return tuple(np.stack(column) for column in zip(*batches, strict=True))

    def batch(self, step: int):
        epoch, batch = divmod(step, self.batches_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = (
                epoch,
                np.random.default_rng((self.seed, Stream.ORDER, epoch)).permutation(len(self.images)),
            )
        start = (batch * self.world_size + self.rank) * self.batch_size
        chosen = self.order[start : start + self.batch_size]

        x = self.images[chosen]  # (B, H, W, C) uint8, or points (B, 2) float32
        if x.dtype != np.uint8:
            return x, self.labels[chosen]
        if self.flip:
            flipped = np.random.default_rng((self.seed, Stream.FLIP, self.rank, step)).random(len(x)) < 0.5
            x[flipped] = x[flipped, :, ::-1]
        return to_float(x), self.labels[chosen]


def make_dataset(
    images: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
    steps: int,
    start_step: int = 0,
    seed: int = 0,
    flip: bool = False,
    rank: int = 0,
    world_size: int = 1,
    steps_per_call: int = 1,
):
    """A MindSpore dataset of the batches of training steps ``start_step`` to ``steps - 1``, a row each.

    Its columns are "image" (B, C, H, W) float32 in [-1, 1] and "label" (B,) int32, from images (N, H, W, C) uint8 and
    labels (N,); with ``flip`` each image is mirrored left to right with probability 1/2. What is float32 already, such as
    points (N, 2), comes as it is. With ``steps_per_call`` K > 1 a row is the batches of K steps, (K, B, ...), and K must
    divide the number of steps.

    A batch is a function of (seed, step, rank) alone, so a run that resumes at step k sees exactly what it would have seen
    without the break, and nothing is read to get there. MindSpore's own random state, which cannot be restored, has no
    part in it. Every epoch has an order of its own, the same on all ranks: each step takes the next world_size *
    batch_size images, rank by rank, and what is left at the epoch's end, too few for a step, is dropped.

    Raises:
        UserError: there are fewer images than one step needs, or no step is left.
    """
    import mindspore.dataset as ds  # here: who only loads images need not wait for it

    check_enough(images, batch_size, world_size)
    if start_step >= steps:
        raise UserError(f"no step is left after step {start_step} of {steps}: raise the number of steps")
    labels = np.asarray(labels, np.int32)
    source = Batches(images, labels, batch_size, steps, start_step, seed, flip, rank, world_size, steps_per_call)
    # One worker: two Python threads are 20 times slower (MindSpore 2.10), and one makes a batch in well under 1 ms
    return ds.GeneratorDataset(
        source, ["image", "label"], shuffle=False, num_parallel_workers=1, python_multiprocessing=False
    )


def check_enough(images, batch_size: int, world_size: int) -> None:
    """UserError where a step needs more images, or points, than there are."""
    if len(images) < batch_size * world_size:
        kind = "points" if images.ndim == 2 else "images"
        raise UserError(
            f"{len(images)} {kind} are fewer than a step's {batch_size} x {world_size} (batch size x ranks): "
            "lower --train.batch-size"
        )


def load_images(name: str, directory: str | None, split: str, size: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, size, size, channels) uint8 in 0..255 and labels (N,) int32 of the set called ``name`` in ``DATASETS``.

    The Fashion-MNIST sets are gray and 28 x 28; for a larger size they get a black border. An image folder has one split.

    Raises:
        UserError: there is no such set, or it does not come in that size or number of channels, or see its loader.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    return DATASETS[name](directory, split, size, channels)


def _fashion_mnist(directory, split, size, channels):
    return _padded("fashion-mnist", *load_fashion_mnist(split, directory), size, channels)


def _fashion_mnist_mini(directory, split, size, channels):
    return _padded("fashion-mnist-mini", *load_fashion_mnist_mini(split), size, channels)


def _image_folder(directory, split, size, channels):
    if not directory:
        raise UserError("--data.name image-folder needs --data.dir, the folder that holds the images")
    return load_image_folder(directory, size, channels)


def _padded(name, images, labels, size, channels):
    _, height, width, has_channels = images.shape
    if size < max(height, width) or channels != has_channels:
        raise UserError(
            f"{name} has images of {height} x {width} x {has_channels}, not {size} x {size} x {channels}: "
            f"set the size to {max(height, width)} or more (the rest is black) and the channels to {has_channels}"
        )
    top, left = (size - height) // 2, (size - width) // 2
    border = ((0, 0), (top, size - height - top), (left, size - width - left), (0, 0))
    return np.pad(images, border), labels


DATASETS = {"fashion-mnist": _fashion_mnist, "fashion-mnist-mini": _fashion_mnist_mini, "image-folder": _image_folder}
