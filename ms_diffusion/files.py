"""Writing files so that no reader sees half of one, the cache of computed arrays, and computation in batches."""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from tqdm import tqdm

T = TypeVar("T")


def write(path: str | os.PathLike, save: Callable[[BinaryIO], object]) -> None:
    """Call save(file) on a temporary file in the folder of `path`, then rename that file to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as f:
            save(f)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until its data are on the disk."""
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names of the files in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def cache_folder(folder: str | os.PathLike | None = None) -> Path:
    """`folder` if it exists and can be written to, else ms_diffusion in the user's cache ($XDG_CACHE_HOME or ~/.cache)."""
    if folder and os.access(folder, os.W_OK | os.X_OK):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ms_diffusion"


def load_or_compute(
    path: str | os.PathLike, load: Callable[[BinaryIO], T], compute: Callable[[], T], save: Callable[[BinaryIO, T], object]
) -> T:
    """load(file) of a cache file; if it is missing or corrupt, compute(), whose result save(file, result) writes to `path`.
    If the file cannot be written, the result is returned all the same."""
    try:
        with open(path, "rb") as file:
            return load(file)
    except Exception:  # a corrupt file raises many kinds of exceptions
        result = compute()
    with contextlib.suppress(OSError):  # on a full or read-only disk the next call computes again
        write(path, lambda file: save(file, result))
    return result


def in_batches(
    fn: Callable[[np.ndarray], Sequence[np.ndarray]], rows: np.ndarray, size: int, name: str | None = None
) -> list[np.ndarray]:
    """The arrays that fn(rows) returns, computed in batches of one size, for which fn is compiled once.
    The last batch is filled up with the last row. With `name` there is a progress bar."""
    size, found = max(min(size, len(rows)), 1), []
    for first in tqdm(range(0, len(rows), size), unit="batch", desc=name, disable=name is None):
        found.append(fn(rows[np.minimum(np.arange(first, first + size), len(rows) - 1)]))
    return [np.concatenate(parts)[: len(rows)] for parts in zip(*found, strict=True)]
