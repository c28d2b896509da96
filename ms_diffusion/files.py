"""Files that no reader ever sees half-written, caches of what can be computed again, and computation in batches."""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from tqdm import tqdm

T = TypeVar("T")


def write(path: str | os.PathLike, save: Callable[[BinaryIO], object]) -> None:
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


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def cache_folder(beside: str | os.PathLike | None = None) -> Path:
    """The folder `beside`, if it exists and can be written to, or else the user's cache ($XDG_CACHE_HOME or ~/.cache)."""
    if beside and os.access(beside, os.W_OK | os.X_OK):
        return Path(beside)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ms_diffusion"


def cached(path: Path, load: Callable[[Path], T], save: Callable[[BinaryIO, T], object], compute: Callable[[], T]) -> T:
    """load(path), or compute() if there is no intact file; then the result is saved. A full disk costs only time."""
    try:
        return load(path)
    except Exception:  # a missing or corrupt file raises a dozen kinds of exceptions
        found = compute()
    with contextlib.suppress(OSError):
        write(path, lambda file: save(file, found))
    return found


def in_batches(
    fn: Callable[[np.ndarray], Sequence[np.ndarray]], rows: np.ndarray, size: int, name: str | None = None
) -> list[np.ndarray]:
    """The arrays that fn(rows) returns, computed in batches of one size, for which fn is compiled once.

    The last batch is filled up with the last row. With `name` there is a progress bar.
    """
    size, found = max(min(size, len(rows)), 1), []
    for first in tqdm(range(0, len(rows), size), unit="batch", desc=name, disable=name is None):
        found.append(fn(rows[np.minimum(np.arange(first, first + size), len(rows) - 1)]))
    return [np.concatenate(parts)[: len(rows)] for parts in zip(*found, strict=True)]
