"""Pictures on disk: grids, animations, curves. Every file is written beside its place and then renamed into it."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

GAP = 2  # pixels between the images of a grid


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


def write(path, save) -> None:
    """Call save(file) on a temporary file beside `path`, then rename it: no reader sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as f:
            save(f)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_grid(path, images: np.ndarray, columns: int | None = None, scale: int = 2) -> None:
    """Write (N, H, W, C) uint8 images as one PNG, each pixel `scale` wide."""
    write(path, lambda f: _picture(grid(images, columns), scale).save(f, "PNG"))


def save_gif(path, frames: list[np.ndarray], columns: int | None = None, scale: int = 2, milliseconds: int = 60) -> None:
    """Write a list of (N, H, W, C) uint8 as an animated GIF of grids; the last frame stays for two seconds."""
    pictures = [_picture(grid(images, columns), scale) for images in frames]
    durations = [milliseconds] * (len(pictures) - 1) + [2000]
    options = {"duration": durations, "loop": 0, "optimize": False}  # Pillow 13's smaller palettes are up to 26 grays off
    write(path, lambda f: pictures[0].save(f, "GIF", save_all=True, append_images=pictures[1:], **options))


def save_loss_curve(path, steps, losses) -> None:
    """Plot the loss against the step, raw and smoothed, as PNG."""
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
    write(path, lambda f: figure.savefig(f, format="png", dpi=120))
