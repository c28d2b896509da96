"""Fashion-MNIST (Xiao et al. 2017, https://github.com/zalandoresearch/fashion-mnist): found on disk, or downloaded.

Any set in the same four IDX files (MNIST, KMNIST, ...) loads in the same way from a folder of its own.
"""

import gzip
import hashlib
import math
import os
import subprocess
import sys
import zlib
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
from tqdm import tqdm

from ..files import cache_folder
from ..runtime import UserError

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
# Of the official .gz files alone: others repack the same images, Debian for one.
MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
TIMEOUT = 30  # seconds without a byte
MINI = Path(__file__).parent / "fashion-mnist-mini"


def load_fashion_mnist(split: str = "train", directory: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28, 1) uint8 in 0..255 and labels (N,) int32 in 0..9; N is 60,000 for "train", 10,000 for "test".

    The files, gzipped or raw, are looked for in ``directory``, in ``$MS_DIFFUSION_DATA`` (and in ``fashion-mnist`` and
    ``FashionMNIST/raw`` below either), in the user's cache folder and where Debian's package dataset-fashion-mnist puts
    them. Else all four are downloaded into the first of the former three that can be written; a download that was cut
    short goes on where it ended. Of several ranks that share a disk let one come first.

    Raises:
        UserError: ``directory`` or the split does not exist, a file is damaged, or there is none and no network.
    """
    _check_split(split)
    if directory and not Path(directory).is_dir():
        raise UserError(f"--data.dir {directory}: no such folder; create it, or leave the option out")

    cache = cache_folder() / "fashion-mnist"
    named = [Path(folder) for folder in (directory, os.environ.get("MS_DIFFUSION_DATA")) if folder]
    below = [folder / sub for folder in named for sub in ("", "fashion-mnist", "FashionMNIST/raw")]
    searched = [*below, cache, *_debian_folders()]
    for folder in searched:
        if all(_find(folder, name) for name in FILES[split]):
            if directory and folder not in below[:3]:
                print(f"fashion-mnist: not in {directory}, read from {folder}", file=sys.stderr)
            return _load(folder, split)

    folder = _first_writable([*named, cache])
    try:
        for name in MD5:
            if not (folder / name).exists():
                _download(name, folder)
    except (URLError, ConnectionError, TimeoutError, HTTPException) as e:
        raise UserError(
            f"Fashion-MNIST is not in {', '.join(map(str, searched))}, and {URL} cannot be reached ({e}). Either put its "
            "four files into a folder and pass --data.dir FOLDER; or apt install dataset-fashion-mnist; or use "
            "--preset quick or --data.name fashion-mnist-mini, which need no download"
        ) from e
    return _load(folder, split)


def load_fashion_mnist_mini(split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """The subset that comes with the library, as ``load_fashion_mnist``: the first 200 ("test": 50) images of each class."""
    _check_split(split)
    return _load(MINI, split)


def read_idx(path: str | Path) -> np.ndarray:
    """The array, uint8 and read-only, in an IDX file (http://yann.lecun.com/exdb/mnist), gzipped or raw.

    Raises:
        UserError: the file is damaged or something else.
    """
    path = Path(path)
    raw = path.read_bytes()
    if path.suffix == ".gz" or raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)  # checks the CRC
        except (OSError, EOFError, zlib.error) as e:
            raise UserError(f"{path}: damaged gzip file ({e}); delete it and fetch it again") from e

    # Two zero bytes, the type (8: uint8), the number of dimensions, each of them as big-endian uint32, the data
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise UserError(f"{path}: not an IDX file of bytes; delete it and fetch it again")
    start = 4 + 4 * raw[3]
    shape = np.frombuffer(raw[4:start], ">u4").tolist()
    if len(raw) - start != math.prod(shape):
        raise UserError(f"{path}: {len(raw) - start} bytes of data where {shape} needs {math.prod(shape)}; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _check_split(split):
    if split not in FILES:
        raise UserError(f"unknown split {split!r}: choose one of {', '.join(FILES)}")


def _debian_folders():
    try:
        listing = subprocess.run(["dpkg", "-L", "dataset-fashion-mnist"], capture_output=True, text=True).stdout
    except OSError:  # not a Debian
        return []
    return [Path(line).parent for line in listing.splitlines() if Path(line).name.startswith(FILES["train"][0])]


def _find(folder, name):
    """The path of the file, gzipped or raw, or None."""
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def _load(folder, split):
    images_path, labels_path = (_find(folder, name) for name in FILES[split])
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3:
        raise UserError(f"{images_path}: holds {images.ndim} dimensions where images have 3; is it another set's file?")
    if labels.shape != images.shape[:1]:
        raise UserError(f"{labels_path}: labels {labels.shape} for {len(images)} images; fetch both files again")
    return images[..., None], labels.astype(np.int32)


def _first_writable(folders):
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise UserError(f"cannot write to {', '.join(map(str, folders))}: pass --data.dir with a folder of yours")


def _download(name, folder):
    """Fetch one official file: into ``name.part``, from where an earlier try ended, then under its name once checked."""
    part = folder / f"{name}.part"
    have = part.stat().st_size if part.exists() else 0
    request = Request(URL + name, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urlopen(request, timeout=TIMEOUT) as response:
            resumed = response.status == 206  # a server may ignore Range and send the whole file: 200
            have = have if resumed else 0
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else None
            with (
                open(part, "ab" if resumed else "wb") as file,
                tqdm(desc=name, initial=have, total=total, unit="B", unit_scale=True) as bar,
            ):
                while block := response.read(1 << 16):
                    file.write(block)
                    bar.update(len(block))
    except HTTPError as e:
        e.close()
        if e.code != 416 or not have:  # 416: there is nothing beyond what we have, it was complete
            raise
    else:
        if total and part.stat().st_size < total:
            raise UserError(f"{URL + name}: the connection ended early; run the same command again to go on from there")

    if hashlib.md5(part.read_bytes(), usedforsecurity=False).hexdigest() != MD5[name]:
        part.unlink()
        raise UserError(f"{URL + name}: what arrived has the wrong MD5 and was removed; run the same command again")
    os.replace(part, folder / name)


def center_crop(images: np.ndarray) -> np.ndarray:
    """Images (N, H, W, C) of this set without the black border of those that are larger than 28 x 28."""
    top, left = (max(side - 28, 0) // 2 for side in images.shape[1:3])
    return images[:, top : top + 28, left : left + 28]
