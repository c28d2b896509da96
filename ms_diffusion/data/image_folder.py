"""A folder of picture files of any size and kind, with classes or captions, read into one array."""

import hashlib
import os
import sys
import textwrap
from collections import Counter
from pathlib import Path, PurePath

import numpy as np

from ..files import check_memory, open_file, shown
from ..progress import ProgressBar
from ..runtime import UserError
from .folder_labels import METADATA, classes_of_folders, classes_of_rows, note, read_metadata, text_files
from .image_set import ImageSet, table_of
from .picture_files import MODES, read_picture
from .picture_files import read_image as read_image

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
EXTENSIONS |= {".apng", ".avif", ".dib", ".heic", ".heif", ".hif", ".jfif", ".jp2", ".j2k", ".jpe", ".pbm", ".pgm", ".ppm"}
IGNORED = {"__MACOSX", "@eaDir"}  # folders that archives of macOS and disks of Synology hold beside the user's
MOST_LINES = 100  # of skipped files
USUAL_DEPTH = 0.1  # of a folder's pictures of more than 8 bits that use a number of them, for that to be no accident


def load_image_folder(
    directory: str | Path,
    size: int,
    channels: int,
    *,
    split: str = "train",
    matte: str = "white",
    validation: float = 0.0,
) -> ImageSet:
    """All picture files below `directory`, in sorted order; names that start with a dot, and `IGNORED`, are left out.

    The classes are the labels in metadata files, or else the first-level subfolders, in natural order ("2" before "10"),
    also the empty ones. The captions are the texts in metadata files, or else the lines of a .txt file beside each picture;
    "" stands for none. A metadata file, metadata.jsonl or metadata.csv, has a line for each picture of its folder and the
    folders in it: file_name, text or label or both. `read_picture` says how a file is read. Of the pictures of more than 8
    bits, one that is darker than the others is taken to use as many bits as they do.

    With `validation` = v > 0, the split "test" has the share v of the pictures, chosen by the hash of a file's content, so
    that it is the same wherever the file lies, and copies stay together; "train" has the others. With 0 both have all. All
    images are held in memory: N * size * size * channels bytes.

    What cannot be read, a picture that metadata leave out, and a link to a folder, are skipped and named on stderr. Raises
    UserError if the folder does not exist, has no readable picture, or more than there is memory for, if its metadata are
    wrong or some pictures lie beside class folders, or if `channels` is neither 1 nor 3.
    """
    directory = Path(directory)
    if channels not in MODES:
        raise UserError(f"images have 1 channel (gray) or 3 (RGB), not {channels}: set --model.channels to 1 or 3")
    if not directory.is_dir():
        raise UserError(f"--data.dir {directory}: no such folder; pass the folder with the images")
    files, folders, skipped = find_files(directory)
    names = sorted(name for name in files if name.suffix.lower() in EXTENSIONS)
    rows, texts = read_metadata(directory, files), {}
    if rows:
        skipped += [(directory / name, "no line of the metadata names it") for name in names if name not in rows]
        if lost := [row.where for name, row in rows.items() if name not in files]:
            note(f"{len(lost)} lines of metadata name no picture that is there", lost)
        names = [name for name in names if name in rows]
        texts = {name: rows[name].captions or () for name in names if rows[name].captions is not None}
    if not texts:
        texts = text_files(directory, names, files)
    if any(row.label is not None for row in rows.values()):
        classes, class_names = classes_of_rows(rows)
    else:
        classes, class_names = classes_of_folders(names, folders, directory, bool(texts))
    note_others(directory, files - set(names) - {name.with_suffix(".txt") for name in texts})

    names = [name for name in names if in_split(directory / name, split, validation, skipped)]
    images, kept = read_pictures(directory, names, size, channels, matte, skipped)
    name_skipped(skipped)
    if not kept:
        kinds = " ".join(sorted(kind[1:] for kind in EXTENSIONS))
        what = f"in its {split} split of --data.validation {validation}" if validation else "in it"
        raise UserError(f"--data.dir {directory}: no readable image {what}; put files of these kinds there: {kinds}")
    labels = np.array([classes[name] for name in kept], np.int32)
    if not texts:
        return ImageSet(images, labels, class_names)
    if bare := [name for name in kept if not texts.get(name)]:
        note(f"{len(bare)} of {len(kept)} pictures have no caption", bare)
    return ImageSet(images, labels, class_names, **table_of([texts.get(name) or ("",) for name in kept]))


def find_files(directory: Path) -> tuple[set[PurePath], list[str], list]:
    """The files below a folder, its first-level folders, and (path, reason) of what is skipped."""
    files, folders_here, skipped, problems = set(), [], [], []
    for parent, folders, found in os.walk(directory, onerror=problems.append):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in IGNORED]
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        skipped += [(Path(parent, name), "it is a link to a folder") for name in links]
        if Path(parent) == directory:
            folders_here = [name for name in folders if name not in links]
        files |= {PurePath(parent, name).relative_to(directory) for name in found if not name.startswith(".")}
    return files, folders_here, [*((e.filename, e.strerror) for e in problems), *skipped]


def in_split(path: Path, split: str, validation: float, skipped: list) -> bool:
    """Whether a file belongs to a split, by its content."""
    if not validation:
        return True
    try:
        with open_file(path) as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as e:
        skipped.append((path, e))
        return False
    return (int.from_bytes(digest.digest()[:4], "big") < validation * 2**32) == (split == "test")


def read_pictures(
    directory: Path, names: list[PurePath], size: int, channels: int, matte: str, skipped: list
) -> tuple[np.ndarray, list[PurePath]]:
    """The images (N, size, size, channels) uint8 of those files that can be read, and their names; the others are added to
    `skipped`."""
    check_memory(len(names) * size * size * channels, f"--data.dir {directory}")
    images = np.empty((len(names), size, size, channels), np.uint8)
    kept, depths, several = [], {}, []
    for name in ProgressBar(names, desc="reading images", unit="", disable=len(names) < 1000):
        try:
            picture = read_picture(directory / name, size, channels, matte)
        except Exception as e:  # the disk, the memory, or the picture
            skipped.append((directory / name, e))
            continue
        images[len(kept)] = picture.pixels
        if picture.depth:
            depths[len(kept)] = picture.depth
        if picture.pages > 1:
            several.append(name)
        kept.append(name)
    if several:
        note(f"the first page alone is read of {len(several)} files with several", several)
    counts = Counter(depths.values())
    usual = sorted(depth for depth, count in counts.items() if count >= USUAL_DEPTH * len(depths))
    for i, depth in depths.items():
        if depth not in usual and (better := [each for each in usual if each > depth]):
            images[i] = read_picture(directory / kept[i], size, channels, matte, better[0]).pixels
    if usual and usual[0] < 16:
        note(f"pictures of 16 bits are taken to use {' or '.join(map(str, usual))} of them, by their largest values")
    return images[: len(kept)], kept


def name_skipped(skipped: list) -> None:
    for path, reason in skipped[:MOST_LINES]:
        print(f"skipped {shown(path)}: {textwrap.shorten(str(reason) or repr(reason), 200)}", file=sys.stderr)
    if len(skipped) > MOST_LINES:
        print(f"skipped {len(skipped) - MOST_LINES} more", file=sys.stderr)


def note_others(directory: Path, files: set[PurePath]) -> None:
    """A line on the files that are neither pictures nor say anything of them."""
    kinds = Counter(name.suffix.lower() or "(no ending)" for name in files if name.name not in METADATA)
    kinds = {kind: count for kind, count in kinds.items() if kind not in EXTENSIONS}
    if kinds:
        listed = ", ".join(f"{count} {shown(kind)}" for kind, count in sorted(kinds.items(), key=lambda item: -item[1])[:5])
        note(f"in {shown(directory)}, files of other kinds are not read: {listed}{', ...' if len(kinds) > 5 else ''}")
