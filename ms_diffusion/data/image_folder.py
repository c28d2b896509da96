"""A folder of image files of any size and format, read into one array."""

import os
import sys
import textwrap
from pathlib import Path

import numpy as np

from ..files import check_memory, shown
from ..progress import ProgressBar
from ..runtime import UserError
from .picture_files import MODES, read_image

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


def load_image_folder(directory: str | Path, size: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, size, size, channels) uint8 in 0..255 and labels (N,) int32, from all image files below `directory`.

    The files are in sorted order; names that start with a dot are ignored. A label is the index of the first-level subfolder
    among the sorted subfolders that contain images; a file directly in `directory` has label 0. `read_image` says how a file
    is read. All images are held in memory: N * size * size * channels bytes. What cannot be read, and a link to a folder, is
    skipped and named on stderr. Raises UserError if the folder does not exist, has no readable image, or more than there is
    memory for, or `channels` is neither 1 nor 3.
    """
    directory = Path(directory)
    if channels not in MODES:
        raise UserError(f"images have 1 channel (gray) or 3 (RGB), not {channels}: set --model.channels to 1 or 3")
    if not directory.is_dir():
        raise UserError(f"--data.dir {directory}: no such folder; pass the folder with the images")
    skipped, names, problems = [], [], []
    for parent, folders, files in os.walk(directory, onerror=problems.append):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        skipped += [(Path(parent, name), "it is a link to a folder") for name in links if not name.startswith(".")]
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(parent, name) for name in files if not name.startswith(".")]
        names += [path.relative_to(directory) for path in paths if path.suffix.lower() in EXTENSIONS]
    names.sort()
    subfolders = sorted({name.parts[0] for name in names if len(name.parts) > 1})

    check_memory(len(names) * size * size * channels, f"--data.dir {directory}")
    images = np.empty((len(names), size, size, channels), np.uint8)
    labels = []
    for name in ProgressBar(names, desc="reading images", unit="", disable=len(names) < 1000):
        try:
            images[len(labels)] = read_image(directory / name, size, channels)
            labels.append(subfolders.index(name.parts[0]) if len(name.parts) > 1 else 0)
        except Exception as e:  # on a corrupt file PIL's decoders raise many kinds of exceptions
            skipped.append((directory / name, e))
    for path, reason in [*((e.filename, e.strerror) for e in problems), *skipped]:
        print(f"skipped {shown(path)}: {textwrap.shorten(str(reason) or repr(reason), 200)}", file=sys.stderr)
    if not labels:
        kinds = " ".join(sorted(kind[1:] for kind in EXTENSIONS))
        raise UserError(f"--data.dir {directory}: no readable image in it; put files of these kinds there: {kinds}")
    return images[: len(labels)], np.array(labels, np.int32)
