"""Data sets by name, and exactly repeatable training batches of arrays in memory."""

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..images import to_float
from ..randomness import Stream, of_step
from ..runtime import UserError
from .captions import CAPTIONS
from .fashion_mnist import CLASSES, load_fashion_mnist, load_fashion_mnist_mini
from .image_folder import load_image_folder
from .image_set import ImageSet as ImageSet
from .image_set import table_of

if TYPE_CHECKING:
    from mindspore.dataset import GeneratorDataset

Labelled = tuple[np.ndarray, np.ndarray]  # images (N, H, W, C) uint8 and labels (N,) int32
Loader = Callable[..., ImageSet | Labelled]


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
) -> "GeneratorDataset":
    """A MindSpore dataset whose rows are the batches of training steps `start_step` to `steps` - 1, one row a step.

    The columns are "image" (B, C, H, W) float32 in [-1, 1] and "label" (B,) int32, made from images (N, H, W, C) uint8 and
    labels (N,). With `flip` each image is mirrored left to right with probability 1/2. Data that are float32 already, such
    as points (N, 2), are passed through unchanged. With `steps_per_call` = K > 1 a row holds the batches of K steps,
    (K, B, ...); K must divide the number of steps. The caller checks first that N is large enough (`check_enough`).

    The batch of all ranks depends on (seed, step) and its size only. A run that resumes at step k therefore gets the same
    batches as an uninterrupted run, and no data is read to get there; MindSpore's own random state, which cannot be
    restored, is not used. Each epoch has its own order, the same on all ranks. Each step takes the next world_size *
    batch_size images, rank by rank; the images at the end of an epoch that are too few for a step are dropped. Raises
    UserError if no step is left.
    """
    import mindspore.dataset as ds  # imported here, so that loading images alone does not wait for it

    if start_step >= steps:
        raise UserError(f"no step is left after step {start_step} of {steps}: increase the number of steps")
    labels = np.asarray(labels, np.int32)

    @lru_cache(1)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, Stream.ORDER, epoch)).permutation(len(images))

    def batch(step: int) -> Labelled:
        epoch, index = divmod(step, len(images) // (batch_size * world_size))
        start = (index * world_size + rank) * batch_size
        chosen = order(epoch)[start : start + batch_size]
        x = images[chosen]  # (B, H, W, C) uint8, or float32 data such as points (B, 2)
        if x.dtype != np.uint8:
            return x, labels[chosen]
        if flip:
            flipped = of_step(seed, Stream.FLIP, step, batch_size, rank, world_size).random(batch_size) < 0.5
            x[flipped] = x[flipped, :, ::-1]
        return to_float(x), labels[chosen]

    class Rows:  # iterated over, because MindSpore lists all indices of a sequence: 8 bytes a step
        def __len__(self) -> int:
            return (steps - start_step) // steps_per_call

        def __iter__(self) -> Iterator[Labelled]:
            for first in range(start_step, start_step + len(self) * steps_per_call, steps_per_call):
                if steps_per_call == 1:
                    yield batch(first)
                else:
                    x, y = zip(*map(batch, range(first, first + steps_per_call)), strict=True)
                    yield np.stack(x), np.stack(y)

    # One worker: two Python threads are 20 times slower (MindSpore 2.10), and one makes a batch in well under 1 ms
    kind = {"shuffle": False, "num_parallel_workers": 1, "python_multiprocessing": False}
    return ds.GeneratorDataset(Rows(), ["image", "label"], **kind)


def check_enough(data: np.ndarray, batch_size: int, world_size: int) -> None:
    """Raise UserError if data (N, ...) are too few for a training step: if N is below batch_size * world_size. A task calls
    this first, before it encodes or saves anything."""
    if len(data) < batch_size * world_size:
        what = f"{len(data)} {'points' if data.ndim == 2 else 'images'}"
        step = f"{batch_size} x {world_size} (batch size x ranks)"
        raise UserError(f"{what} are too few for a step of {step}: lower --train.batch-size")


def check_values(data: np.ndarray, noun: str) -> None:
    """Raise UserError if data (N, ...) hold values that are not finite. Says on stderr if they hold one value everywhere, or
    look like images of 0 and 1, not 0 to 255. `noun` is what they are called."""
    if data.dtype.kind == "f":
        bad = ~np.isfinite(data).reshape(len(data), -1).all(1)
        if bad.any():
            which = f"{bad.sum()} of {len(data)} {noun}, the first of them number {bad.argmax()}"
            raise UserError(f"{which}, hold NaN or infinity: remove or mend them")
    low, high = (data.min(), data.max()) if data.size else (0, 1)
    if low == high:
        print(f"note: all values of the {noun} are {low}: there is nothing to learn from them", file=sys.stderr)
    elif data.dtype == np.uint8 and high <= 1:
        print(f"note: the {noun} hold only 0 and 1, where 255 is white: multiply them by 255 if 1 means so", file=sys.stderr)


def fingerprint(data: np.ndarray, labels: np.ndarray) -> str:
    """A SHA-256 of data and labels, of their types and shapes too."""
    digest = hashlib.sha256()
    for array in (data, labels):
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def check_images(images: np.ndarray, prefix: str = "") -> None:
    """Raise UserError, whose message starts with `prefix`, if an array of images is not (N, H, W, C) uint8, square, C = 1 or
    3, and not empty."""
    shape, dtype = np.shape(images), getattr(images, "dtype", type(images).__name__)
    if len(shape) != 4 or shape[-1] not in (1, 3) or 0 in shape:
        raise UserError(f"{prefix}the shape of the images must be (N, H, W, C) with C = 1 or 3, not {shape}")
    if dtype != np.uint8:
        raise UserError(f"{prefix}images must be uint8, 0 to 255, not {dtype}: convert floats in [-1, 1] by to_uint8")
    if shape[1] != shape[2]:
        raise UserError(f"{prefix}images must be square, not {shape[1]} x {shape[2]}: crop or resize them")


def check_labels(labels: np.ndarray, num: int, prefix: str = "") -> None:
    """Raise UserError, whose message starts with `prefix`, if labels are not (num,) integers of 0 or more."""
    if labels.shape != (num,) or labels.dtype.kind not in "iu":
        raise UserError(f"{prefix}labels must be {num} integers, not {labels.shape} of {labels.dtype}")
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        raise UserError(f"{prefix}labels must be 0 or more, and fit in int32, not {labels.min()} to {labels.max()}")


def load_image_set(name: str, directory: str | None, split: str, size: int, channels: int, **options: Any) -> ImageSet:
    """The images of the data set `name` in `DATASETS`, size x size pixels each. `options` are passed to the loader where it
    has keyword-only parameters of these names.

    The Fashion-MNIST sets are gray and 28 x 28; for a larger size they get a black border. Raises UserError if the data set
    does not exist, does not have that size or number of channels, or its loader fails.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    loader = DATASETS[name]
    taken = [p.name for p in inspect.signature(loader).parameters.values() if p.kind is p.KEYWORD_ONLY]
    found = loader(directory, split, size, channels, **{key: options[key] for key in taken if key in options})
    found = found if isinstance(found, ImageSet) else ImageSet(*found)
    return found if found.class_names else replace(found, class_names=CLASS_NAMES.get(name))


def random_images(num: int, size: int, channels: int) -> ImageSet:
    """`num` images of random pixels, of class 0 and with captions: for what depends on the shapes of data alone."""
    pixels, ids = np.random.default_rng(0).integers(0, 256, (num, size, size, channels), np.uint8), np.zeros(num, np.int32)
    return ImageSet(pixels, ids, captions=CAPTIONS, caption_ids=ids)


def load_images(name: str, directory: str | None, split: str, size: int, channels: int, **options: Any) -> Labelled:
    """Images (N, size, size, channels) uint8 in 0..255 and labels (N,) int32: those of `load_image_set`."""
    found = load_image_set(name, directory, split, size, channels, **options)
    return found.images, found.labels


def with_captions(images: np.ndarray, labels: np.ndarray, captions: Sequence[Any], class_names: Any = None) -> ImageSet:
    """Images with the captions of each: a text, or several. Raises UserError if their number differs, or an image has no
    caption."""
    rows = [(each,) if isinstance(each, str) else tuple(each) for each in captions]
    if len(rows) != len(images):
        raise UserError(f"{len(images)} images have {len(rows)} captions: give one, or a list of some, for each image")
    for i, row in enumerate(rows):
        if not row or not all(isinstance(text, str) and text.strip() for text in row):
            raise UserError(f"the captions of image {i} are {row!r:.100}: give at least one text, and none that is empty")
    return ImageSet(images, labels, class_names, **table_of(rows))


def _with_border(name: str, load: Callable[[str, str | None], Labelled]) -> Loader:
    """The loader of images that load(split, directory) returns in one size; a black border enlarges them. Each class has
    the captions of Fashion-MNIST's."""

    def loader(directory: str | None, split: str, size: int, channels: int) -> ImageSet:
        images, labels = load(split, directory)
        height, width, depth = images.shape[1:]
        if size < max(height, width) or channels != depth:
            raise UserError(
                f"{name} has images of {height} x {width} x {depth}, not {size} x {size} x {channels}: "
                f"set the size to {max(height, width)} or more (the rest is black) and the channels to {depth}"
            )
        top, left = (size - height) // 2, (size - width) // 2
        images = np.pad(images, ((0, 0), (top, size - height - top), (left, size - width - left), (0, 0)))
        return ImageSet(images, labels, None, CAPTIONS, labels)

    return loader


def _image_folder(
    directory: str | None, split: str, size: int, channels: int, *, matte: str = "white", validation: float = 0.0
) -> ImageSet:
    if not directory:
        raise UserError("--data.name image-folder needs --data.dir, the folder that holds the images")
    return load_image_folder(directory, size, channels, split=split, matte=matte, validation=validation)


def _arrays(directory: str | None, split: str, size: int, channels: int) -> Labelled:
    raise UserError("this run was trained on arrays, which it does not keep: name a data set, or call md.train again")


# DATASETS["mine"] = loader adds a data set: loader(directory, split, size, channels) -> (images, labels) or an ImageSet
DATASETS: dict[str, Loader] = {
    "fashion-mnist": _with_border("fashion-mnist", load_fashion_mnist),
    "fashion-mnist-mini": _with_border("fashion-mnist-mini", lambda split, _: load_fashion_mnist_mini(split)),
    "image-folder": _image_folder,
    "arrays": _arrays,
}

# Names of the classes of a data set, in the order of the labels; CLASS_NAMES["mine"] = names adds some
CLASS_NAMES: dict[str, tuple[str, ...]] = {"fashion-mnist": CLASSES, "fashion-mnist-mini": CLASSES}
