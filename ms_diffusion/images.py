"""Pictures on disk: grids, animations, curves. Every file is written beside its place and then renamed into it."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .files import write

GAP = 2  # pixels between the images of a grid
CAPTION = 5  # and below each for its name


def to_uint8(x) -> np.ndarray:
    """(N, C, H, W) floats in [-1, 1], clipped -> (N, H, W, C) uint8."""
    x = np.asarray(x, np.float32).transpose(0, 2, 3, 1)
    return np.clip(np.round((x + 1) * 127.5), 0, 255).astype(np.uint8)


def to_float(images) -> np.ndarray:
    """(N, H, W, C) uint8 -> (N, C, H, W) float32 in [-1, 1]."""
    return np.asarray(images).transpose(0, 3, 1, 2).astype(np.float32, order="C") / np.float32(127.5) - np.float32(1)


def picture_size(path) -> tuple[int, int]:
    """(height, width) of an image file."""
    with Image.open(path) as picture:
        return picture.height, picture.width


def grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """(N, H, W, C) uint8 -> one (H', W', C) picture, row by row, on black."""
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


def save_grid(path, images: np.ndarray, columns: int | None = None, scale: int = 2, captions=None) -> None:
    """Write (N, H, W, C) uint8 images as one PNG, each pixel `scale` wide, and below each its caption, if there are any."""
    if captions is None:
        picture = _picture(grid(images, columns), scale)
    else:
        picture = _picture(grid(np.pad(images, ((0, 0), (0, CAPTION), (0, 0), (0, 0))), columns), scale)
        import matplotlib  # for its font

        font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", int(CAPTION * scale * 0.8))
        draw = ImageDraw.Draw(picture)
        height, width = images.shape[1] + CAPTION + GAP, images.shape[2] + GAP
        columns = (picture.width // scale - GAP) // width
        for i, caption in enumerate(captions):
            middle, top = GAP + (i % columns + 0.5) * width, (i // columns + 1) * height - CAPTION
            draw.text((scale * middle, scale * top), caption, "white", font, "mt")
    write(path, lambda f: picture.save(f, "PNG"))


def save_gif(path, frames: list[np.ndarray], columns: int | None = None, scale: int = 2, milliseconds: int = 60) -> None:
    """Write a list of (N, H, W, C) uint8 as an animated GIF of grids; the last frame stays for two seconds."""
    pictures = [_picture(grid(images, columns), scale) for images in frames]
    durations = [milliseconds] * (len(pictures) - 1) + [2000]
    options = {"duration": durations, "loop": 0, "optimize": False}  # Pillow 13's smaller palettes are up to 26 grays off
    write(path, lambda f: pictures[0].save(f, "GIF", save_all=True, append_images=pictures[1:], **options))


def save_loss_curve(path, steps, losses, scores=()) -> None:
    """Plot the loss against the step, raw and smoothed, as PNG; `scores` are (step, FID), drawn to a scale at the right."""
    from matplotlib.figure import Figure  # takes a second to import, and only here

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, alpha=0.3, label="loss")
    if len(losses) >= 20:
        width = len(losses) // 10
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        axes.plot(steps[width - 1 :], smooth, label=f"mean of {width}")
    axes.set(xlabel="step", ylabel="loss", yscale="log" if min(losses) > 0 else "linear")  # a learned variance goes below
    axes.legend()
    if scores:
        right = axes.twinx()
        right.plot(*zip(*scores, strict=True), "o-", color="C2")
        right.set(ylabel="FID", yscale="log")
    write(path, lambda f: figure.savefig(f, format="png", dpi=120))
