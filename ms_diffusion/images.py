"""Grids of images, animations and curves, as pictures and as files (see `files.write`)."""

import contextlib
import gc
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from .files import check_memory, open_file, write

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs of odd files says no more than its errors
GAP = 2  # pixels between the images of a grid
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF")  # whose readers do nothing else, such as start a program
MOST_PIXELS = 150_000_000  # of a picture that is read
CAPTION = 5  # pixels below each image for its caption
CURVE_POINTS = 2000  # more could not be told apart


def to_uint8(x: np.ndarray) -> np.ndarray:
    """(N, C, H, W) floats, clipped to [-1, 1] -> (N, H, W, C) uint8."""
    x = np.asarray(x, np.float32).transpose(0, 2, 3, 1)
    return np.clip(np.round((x + 1) * 127.5), 0, 255).astype(np.uint8)


def to_float(images: np.ndarray) -> np.ndarray:
    """(N, H, W, C) uint8 -> (N, C, H, W) float32 in [-1, 1]."""
    return np.asarray(images).transpose(0, 3, 1, 2).astype(np.float32, order="C") / np.float32(127.5) - np.float32(1)


@contextlib.contextmanager
def open_picture(path: str | Path) -> Iterator[Image.Image]:
    """An image file, open for its size, and for its pixels, which are not unpacked yet. Raises OSError if it cannot be read
    or is no file, ValueError if it is of another kind or has more than `MOST_PIXELS`, UserError if it needs more memory than
    there is."""
    with open_file(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, of files that it reads all the same
        try:
            picture = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError as e:
            raise ValueError(f"it is no picture of the kinds {' '.join(FORMATS)}") from e
        with picture:
            if (pixels := picture.width * picture.height) > MOST_PIXELS:
                raise ValueError(f"it has {pixels / 1e6:.0f} million pixels, and {MOST_PIXELS / 1e6:.0f} are read at most")
            if pixels > 1_000_000:  # below that, the question costs more than the picture
                check_memory(16 * pixels, "its picture")  # four of 4 bytes a pixel
            yield picture


def picture_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of an image file, which is opened by `open_picture`."""
    with open_picture(path) as picture:
        return picture.height, picture.width


def grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """(N, H, W, C) uint8 -> one (H', W', C) uint8, row by row, on black; as many columns as rows if not given."""
    n, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    sheet = np.zeros((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels), np.uint8)
    for i, image in enumerate(images):
        top, left = GAP + i // columns * (height + GAP), GAP + i % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = image
    return sheet


def _picture(sheet: np.ndarray, scale: int) -> Image.Image:
    picture = Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def show_grid(
    images: np.ndarray, columns: int | None = None, scale: int = 2, captions: Sequence[str] | None = None
) -> Image.Image:
    """One picture of images (N, H, W, C) uint8: each pixel is `scale` wide, each caption is below its image. One image of
    scale 1 is that image, without a border."""
    if captions is None and scale == len(images) == 1:
        return _picture(images[0], scale)
    if captions is None:
        return _picture(grid(images, columns), scale)
    import matplotlib  # for its font

    picture = _picture(grid(np.pad(images, ((0, 0), (0, CAPTION), (0, 0), (0, 0))), columns), scale)
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", int(CAPTION * scale * 0.8))
    draw = ImageDraw.Draw(picture)
    height, width = images.shape[1] + CAPTION + GAP, images.shape[2] + GAP
    per_row = (picture.width // scale - GAP) // width
    for i, caption in enumerate(captions):
        center, top = GAP + (i % per_row + 0.5) * width, (i // per_row + 1) * height - CAPTION
        draw.text((scale * center, scale * top), caption, "white", font, "mt")
    return picture


def save_grid(
    path: str | Path, images: np.ndarray, columns: int | None = None, scale: int = 2, captions: Sequence[str] | None = None
) -> None:
    """Write `show_grid` as a PNG file."""
    picture = show_grid(images, columns, scale, captions)
    write(path, lambda f: picture.save(f, "PNG"))


def save_gif(
    path: str | Path, frames: list[np.ndarray], columns: int | None = None, scale: int = 2, milliseconds: int = 60
) -> None:
    """Write a list of (N, H, W, C) uint8 as an animated GIF of grids; the last frame is shown for two seconds."""
    pictures = [_picture(grid(images, columns), scale) for images in frames]
    durations = [milliseconds] * (len(pictures) - 1) + [2000]
    options = {"duration": durations, "loop": 0, "optimize": False}  # Pillow 13's optimized palettes are up to 26 grays off
    write(path, lambda f: pictures[0].save(f, "GIF", save_all=True, append_images=pictures[1:], **options))


def save_loss_curve(
    path: str | Path, steps: Sequence[int], losses: Sequence[float], scores: Sequence[tuple[int, float]] = ()
) -> None:
    """Write a PNG of the loss over the step, raw and smoothed; `scores` are pairs (step, FID), on an axis at the right. Of a
    long curve, means of neighbours are drawn."""
    from matplotlib.figure import Figure  # takes a second to import

    gc.collect()  # the last figure, 2 MB of objects that refer to each other: a run draws one at each checkpoint
    group = -(-len(losses) // CURVE_POINTS)
    steps, losses = steps[::group], [float(np.mean(losses[i : i + group])) for i in range(0, len(losses), group)]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, alpha=0.3, label="loss")
    if len(losses) >= 20:
        width = len(losses) // 10
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        axes.plot(steps[width - 1 :], smooth, label=f"mean of {width}")
    scale = "log" if min(losses) > 0 else "linear"  # a learned variance can make the loss negative
    axes.set(xlabel="step", ylabel="loss", yscale=scale)
    axes.legend()
    if scores:
        right = axes.twinx()
        right.plot(*zip(*scores, strict=True), "o-", color="C2")
        right.set(ylabel="FID", yscale="log")
    write(path, lambda f: figure.savefig(f, format="png", dpi=120))
