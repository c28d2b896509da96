"""Grids of images, animations and curves, as pictures and as files (see `files.write`)."""

import contextlib
import functools
import gc
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from .files import Source, opened, write
from .runtime import UserError

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs of odd files says no more than its errors
GAP = 2  # pixels between the images of a grid
# Whose readers do nothing else, such as start a program
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM")
ORIENTATION = 0x0112  # a tag of EXIF and TIFF
CAPTION = 5  # pixels below each image for its caption
CURVE_POINTS = 2000  # more could not be told apart


def to_uint8(x: np.ndarray) -> np.ndarray:
    """(N, C, H, W) floats, clipped to [-1, 1] -> (N, H, W, C) uint8."""
    x = np.asarray(x, np.float32).transpose(0, 2, 3, 1)
    return np.clip(np.round((x + 1) * 127.5), 0, 255).astype(np.uint8)


def to_float(images: np.ndarray) -> np.ndarray:
    """(N, H, W, C) uint8 -> (N, C, H, W) float32 in [-1, 1]."""
    return np.asarray(images).transpose(0, 3, 1, 2).astype(np.float32, order="C") / np.float32(127.5) - np.float32(1)


@functools.cache
def picture_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that can be read here; HEIF where pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]

        register_heif_opener()
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


class PictureError(ValueError):
    """Why a file cannot be read as a picture."""


@contextlib.contextmanager
def open_picture(source: Source) -> Iterator[ImageFile]:
    """An image file, open for its size, and for its pixels, which are not unpacked yet.

    Raises OSError if it cannot be read or is no file, PictureError if it is of another kind or damaged: what PIL's decoders
    raise inside the block, which is of many kinds, becomes that, too."""
    most = Image.MAX_IMAGE_PIXELS
    with opened(source) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, of files that it reads all the same
        try:
            Image.MAX_IMAGE_PIXELS = None  # the readers have bounds of their own
            with Image.open(file, formats=picture_formats()) as picture:
                yield picture
        except UnidentifiedImageError as e:
            raise PictureError(_why_unknown(file)) from e
        except (PictureError, UserError, MemoryError):
            raise
        except Exception as e:
            if isinstance(e, OSError) and e.errno:  # of the disk
                raise
            said = "" if not str(e) or str(e).lstrip("-").isdecimal() else f" ({e})"
            raise PictureError(f"it is damaged or cut off{said}") from e
        finally:
            Image.MAX_IMAGE_PIXELS = most


def _why_unknown(file: BinaryIO) -> str:
    """Why PIL reads no picture from an open file."""
    file.seek(0)
    begin = file.read(16)
    if not begin:
        return "it is empty"
    for kind in picture_formats():
        factory, accept = Image.OPEN[kind]
        if accept and accept(begin) is True:
            try:
                file.seek(0)
                factory(file, "")
            except Exception as e:  # of many kinds
                return f"it is a {kind} file that is damaged or cut off, or of a sort that Pillow cannot read ({e})"
    if begin[4:8] == b"ftyp":
        return "it is a HEIC or AVIF picture, or a film; pictures of these kinds are read once pillow-heif is installed"
    return f"it is no picture of the kinds {' '.join(picture_formats())}: it begins with {begin!r}"


def orientation(picture: Image.Image) -> int:
    """The EXIF orientation; 1 where it is unknown, EXIF is damaged, or PIL has turned the picture already."""
    try:
        return int(Image.Image.getexif(picture).get(ORIENTATION, 1))  # PNG's own would unpack the picture
    except Exception:  # of many kinds
        return 1


def picture_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of an image file, which is opened by `open_picture`, as it is seen: turned by its orientation."""
    with open_picture(path) as picture:
        turned = picture.format != "TIFF" and orientation(picture) in (5, 6, 7, 8)  # PIL gives the size of TIFF turned
        return (picture.width, picture.height) if turned else (picture.height, picture.width)


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


def loss_figure(
    steps: Sequence[int],
    losses: Sequence[float],
    scores: Sequence[tuple[int, float]] = (),
    held: Sequence[tuple[int, float, float]] = (),
    size: tuple[float, float] = (6, 4),
) -> Any:
    """A figure of matplotlib, `size` inches wide and high: the loss over the step, raw and smoothed; `scores` are pairs
    (step, FID), on an axis at the right. Of a long curve, means of neighbours are drawn. `held` are (step, loss of held-out
    data, the same with averaged weights)."""
    from matplotlib.figure import Figure  # takes a second to import

    gc.collect()  # the last figure, 2 MB of objects that refer to each other: a run draws one at each checkpoint
    steps, losses = thinned(steps, losses)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, alpha=0.3, label="loss")
    if len(losses) >= 20:
        width = len(losses) // 10
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        axes.plot(steps[width - 1 :], smooth, label=f"mean of {width}")
    if held:
        times, values, averaged = zip(*held, strict=True)
        axes.plot(times, values, ".-", color="C3", alpha=0.3, label="held-out data")
        axes.plot(times, averaged, ".-", color="C3", label="held-out data, average")
    lowest = min([*losses, *(loss for row in held for loss in row[1:])])
    scale = "log" if lowest > 0 else "linear"  # a learned variance can make the loss negative
    axes.set(xlabel="step", ylabel="loss", yscale=scale)
    axes.legend()
    if scores:
        right = axes.twinx()
        right.plot(*zip(*scores, strict=True), "o-", color="C2")
        right.set(ylabel="FID", yscale="log")
    return figure


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[Sequence[int], list[float]]:
    """At most `CURVE_POINTS` steps and values of a curve: means of neighbours, where it has more."""
    group = max(-(-len(values) // CURVE_POINTS), 1)
    return steps[::group], [float(np.mean(values[i : i + group])) for i in range(0, len(values), group)]


def save_loss_curve(
    path: str | Path,
    steps: Sequence[int],
    losses: Sequence[float],
    scores: Sequence[tuple[int, float]] = (),
    held: Sequence[tuple[int, float, float]] = (),
) -> None:
    """Write a `loss_figure` as a PNG file."""
    figure = loss_figure(steps, losses, scores, held)
    write(path, lambda f: figure.savefig(f, format="png", dpi=120))
