"""A folder of images of any size and kind, made into one array."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from ..runtime import UserError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
MODES = {1: "L", 3: "RGB"}


def load_image_folder(directory: str | Path, size: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, size, size, channels) uint8 in 0..255 and labels (N,) int32, of all image files below ``directory``.

    The files come in sorted order; names that start with a dot are passed over. A label is the index of the first-level
    subfolder among the sorted ones that hold images; a file in none has 0. See ``read_image`` for how each is read. All
    is held in memory: N * size * size * channels bytes. A file that cannot be read is named on stderr and left out.

    Raises:
        UserError: there is no such folder or no readable image in it, or channels is neither 1 nor 3.
    """
    directory = Path(directory)
    if channels not in MODES:
        raise UserError(f"images have 1 channel (gray) or 3 (RGB), not {channels}: set --model.channels to one of them")
    if not directory.is_dir():
        raise UserError(f"--data.dir {directory}: no such folder; pass the one that holds the images")
    names = sorted(
        path.relative_to(directory) for path in directory.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file()
    )
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    subfolders = sorted({name.parts[0] for name in names if len(name.parts) > 1})

    images = np.empty((len(names), size, size, channels), np.uint8)
    labels = []
    for name in tqdm(names, desc="reading images", unit="", disable=len(names) < 1000):
        try:
            images[len(labels)] = read_image(directory / name, size, channels)
        except Exception as e:  # PIL's decoders raise anything on a damaged file
            tqdm.write(f"skipped {directory / name}: {e}", file=sys.stderr)
        else:
            labels.append(subfolders.index(name.parts[0]) if len(name.parts) > 1 else 0)
    if not labels:
        kinds = " ".join(sorted(kind[1:] for kind in EXTENSIONS))
        raise UserError(f"--data.dir {directory}: no readable image in it; it should hold files of the kinds {kinds}")
    return images[: len(labels)], np.array(labels, np.int32)


def read_image(path: str | Path, size: int, channels: int) -> np.ndarray:
    """One image (size, size, channels) uint8, gray or RGB: of an animation the first frame, upright as EXIF has it.

    What is transparent shows white; 16-bit gray keeps its upper byte. The shorter side is resized to ``size`` (Lanczos)
    and the middle of the longer one kept.
    """
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floats, of no known range")
    if image.mode.startswith("I"):  # convert() would clip 16 bits at 255
        image = Image.fromarray((np.asarray(image).astype(np.int32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert(MODES[channels]), (size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(size, size, channels)
