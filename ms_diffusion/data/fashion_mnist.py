"""Fashion-MNIST (Xiao et al. 2017, https://github.com/zalandoresearch/fashion-mnist): read from disk, or downloaded.

Other data sets in the same four IDX files (MNIST, KMNIST, ...) load in the same way from their own folder.
"""

import contextlib
import gzip
import hashlib
import math
import os
import subprocess
import sys
import time
import zlib
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import numpy as np

from ..files import cache_folder, check_memory, locked, open_file, write
from ..progress import ProgressBar
from ..runtime import UserError

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
# Of the official .gz files only: others compress the same images anew, as Debian does
MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
SIZES = dict(zip(MD5, (26421880, 29515, 4422102, 5148), strict=True))  # bytes
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
BELOW = ("", "fashion-mnist", "FashionMNIST/raw")  # subfolders where the files may be
TIMEOUT, MOST_SECONDS = 30, 3600  # without a byte; for a file
DIMENSIONS = 4  # of an IDX file's array, at most
DEFLATED = 1032  # bytes, at most, that a byte of a gzip file stands for
MINI = Path(__file__).parent / "fashion-mnist-mini"


def load_fashion_mnist(split: str = "train", directory: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28, 1) uint8 in 0..255 and labels (N,) int32 in 0..9; N is 60,000 for "train", 10,000 for "test".

    The files, gzipped or raw, are searched in `directory`, in $MS_DIFFUSION_DATA (in both also in the subfolders
    fashion-mnist and FashionMNIST/raw), in the user's cache folder, and in the folder of Debian's package
    dataset-fashion-mnist. If they are in none of them, all four are downloaded to the first of the former three that can be
    written to. If several ranks share a disk, let one of them load first. Raises UserError if `directory` or the split does
    not exist, a file is corrupt, or the download fails.
    """
    _check_split(split)
    if directory and not Path(directory).is_dir():
        raise UserError(f"--data.dir {directory}: no such folder; create it, or leave the option out")

    folder, searched = find_fashion_mnist(split, directory)
    if folder:
        if directory and folder not in searched[: len(BELOW)]:
            print(f"fashion-mnist: not in {directory}, read from {folder}", file=sys.stderr)
        return _load(folder, split)

    folder = _first_writable([*_named(directory), cache_folder() / "fashion-mnist"])
    try:
        with locked(folder):  # the ranks of a machine download the files once
            for name in MD5:
                if not (folder / name).exists():
                    _download(name, folder)
    except (URLError, ConnectionError, TimeoutError, HTTPException) as e:
        if isinstance(e, HTTPError):
            e.close()
        raise UserError(
            f"Fashion-MNIST is not in {', '.join(map(str, searched))}, and {URL} cannot be reached ({e}). Put its four "
            "files into a folder and pass --data.dir FOLDER, or apt install dataset-fashion-mnist, or use --preset quick or "
            "--data.name fashion-mnist-mini, which need no download"
        ) from e
    return _load(folder, split)


def find_fashion_mnist(split: str = "train", directory: str | None = None) -> tuple[Path | None, list[Path]]:
    """The folder that `load_fashion_mnist` reads, or None, and all folders where it looks."""
    below = [folder / sub for folder in _named(directory) for sub in BELOW]
    searched = [*below, cache_folder() / "fashion-mnist", *_debian_folders()]
    found = (folder for folder in searched if all(_find(folder, name) for name in FILES[split]))
    return next(found, None), searched


def _named(directory: str | None) -> list[Path]:
    """The folders that the user has named."""
    return [Path(folder) for folder in (directory, os.environ.get("MS_DIFFUSION_DATA")) if folder]


def load_fashion_mnist_mini(split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """The subset in the package, in the format of `load_fashion_mnist`: the first 200 ("test": 50) images of each class."""
    _check_split(split)
    return _load(MINI, split)


def center_crop(images: np.ndarray) -> np.ndarray:
    """The central 28 x 28 pixels of images (N, H, W, C): those of this data set without their black border."""
    top, left = (max(side - 28, 0) // 2 for side in images.shape[1:3])
    return images[:, top : top + 28, left : left + 28]


def read_idx(path: str | Path) -> np.ndarray:
    """The array, uint8 and read-only, in an IDX file (http://yann.lecun.com/exdb/mnist), gzipped or raw. No more is unpacked
    than the size in its header. Raises OSError if the file cannot be read, UserError if it is corrupt, not an IDX file, or
    larger than there is memory."""
    path, advice = Path(path), "delete it and download it again"
    with open_file(path) as file:
        zipped = file.read(2) == b"\x1f\x8b" or path.suffix == ".gz"
        file.seek(0)
        source = gzip.GzipFile(fileobj=file) if zipped else file
        try:
            # Two zero bytes, the type (8: uint8), the number of dimensions, each of them as big-endian uint32, the data
            start = source.read(4)
            known = len(start) == 4 and start[:3] == b"\0\0\x08" and start[3] <= DIMENSIONS
            sizes = source.read(4 * start[3]) if known else b""
            if not known or len(sizes) != 4 * start[3]:
                raise UserError(f"{path}: not an IDX file of bytes; {advice}")
            shape = np.frombuffer(sizes, ">u4").tolist()
            size = math.prod(shape)
            found = os.fstat(file.fileno()).st_size - (0 if zipped else file.tell())
            if size > DEFLATED * found if zipped else size != found:
                raise UserError(f"{path}: {found} bytes for an array of shape {shape}; {advice}")
            check_memory(size, path)
            data = source.read(size + 1)  # at the end of a gzip file its CRC is checked
        except (OSError, EOFError, zlib.error) as e:
            raise UserError(f"{path}: corrupt gzip file ({e}); {advice}") from e
    if len(data) != size:
        raise UserError(f"{path}: not the {size} bytes of an array of shape {shape}; {advice}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _check_split(split: str) -> None:
    if split not in FILES:
        raise UserError(f"unknown split {split!r}: choose one of {', '.join(FILES)}")


def _debian_folders() -> list[Path]:
    try:
        done = subprocess.run(["dpkg", "-L", "dataset-fashion-mnist"], capture_output=True, timeout=30)
        listing = os.fsdecode(done.stdout)
    except (OSError, subprocess.TimeoutExpired):  # dpkg is not installed
        return []
    return [Path(line).parent for line in listing.splitlines() if Path(line).name.startswith(FILES["train"][0])]


def _find(folder: Path, name: str) -> Path | None:
    """The path of the file, gzipped or raw; None if there is neither. Raises UserError if it is no file."""
    paths = folder / f"{name}.gz", folder / name
    found = next((path for path in paths if path.is_file()), None)
    if not found and (others := [path for path in paths if path.exists()]):
        raise UserError(f"{others[0]} is a folder or a device, not a file: replace it by the file of that name")
    return found


def _load(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    images_path, labels_path = (_find(folder, name) or folder / name for name in FILES[split])
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or 0 in images.shape:
        raise UserError(f"{images_path}: an array {images.shape} is not one of images; replace it by the file of that name")
    if labels.shape != images.shape[:1]:
        raise UserError(f"{labels_path}: labels {labels.shape} for {len(images)} images; download both files again")
    return images[..., None], labels.astype(np.int32)


def _first_writable(folders: list[Path]) -> Path:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
    raise UserError(f"cannot write to {', '.join(map(str, folders))}: pass --data.dir with a folder that you can write to")


def _download(name: str, folder: Path) -> None:
    """Download one official file, check it, and write it to the folder."""
    data, end = bytearray(), time.monotonic() + MOST_SECONDS
    with urlopen(URL + name, timeout=TIMEOUT) as response, ProgressBar(total=SIZES[name], desc=name) as bar:
        while len(data) <= SIZES[name] and (part := response.read1(1 << 16)):
            data += part
            bar.update(len(part))
            if time.monotonic() > end:
                raise TimeoutError(f"no more than {len(data)} bytes in {MOST_SECONDS} s")
    if len(data) != SIZES[name] or hashlib.md5(data, usedforsecurity=False).hexdigest() != MD5[name]:
        raise UserError(f"{URL + name}: the download is incomplete or corrupt (wrong MD5); run the same command again")
    write(folder / name, lambda f: f.write(data))
