"""Writing files so that no reader sees half of one, the cache of computed arrays, and computation in batches."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from tqdm import tqdm

from .runtime import alone, broadcast, gather, ranks

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


def share_files(paths: Sequence[Path]) -> None:
    """Let all ranks have the files that rank 0 has; all call this. A rank on a disk of its own writes them there."""
    for path in paths:
        data = broadcast(path.read_bytes() if ranks()[0] == 0 else b"")
        if not (path.exists() and path.read_bytes() == data):
            write(path, lambda file, data=data: file.write(data))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process of this machine at a time do what follows with a folder, such as a download."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
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
    If the file cannot be written, the result is returned all the same. Several ranks compute together if one of them has no
    file, and rank 0 writes it."""
    found, (rank, _) = [], ranks()
    with contextlib.suppress(Exception), open(path, "rb") as file:  # a corrupt file raises many kinds of exceptions
        found.append(load(file))
    if gather(np.array([len(found)], np.int32)).all():
        return found[0]
    result = compute()
    if rank == 0:
        with contextlib.suppress(OSError):  # on a full or read-only disk the next call computes again
            write(path, lambda file: save(file, result))
    return result


def in_batches(
    fn: Callable[[np.ndarray], Sequence[np.ndarray]], rows: np.ndarray, size: int, name: str | None = None
) -> list[np.ndarray]:
    """The arrays that fn(rows) returns, computed in batches of one size, for which fn is compiled once.
    The last batch is filled up with the last row. With `name` there is a progress bar.

    Several ranks share the batches and all return the same: all of them call this with the same rows, or one of them
    `runtime.alone`. The batches are smaller than `size` where there would be fewer of them than ranks."""
    rank, world_size = ranks()
    size = max(min(size, -(-len(rows) // world_size)), 1)
    share = -(-len(rows) // (size * world_size)) * size  # rows of each rank
    found = []
    with alone():
        batches = range(rank * share, (rank + 1) * share, size)
        for first in tqdm(batches, unit="batch", desc=name, disable=name is None or rank > 0):
            found.append(fn(rows[np.minimum(np.arange(first, first + size), len(rows) - 1)]))
    parts = (gather(np.concatenate(part)) for part in zip(*found, strict=True))
    return [part.reshape(-1, *part.shape[2:])[: len(rows)] for part in parts]
